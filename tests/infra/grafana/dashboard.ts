// What Grafana's own types say a dashboard is, of the panels that ours has. @grafana/schema is generated from Grafana's
// schemas; its Panel leaves options and custom fields open, which are in the schema of each panel's plugin.
import type { DataQuery } from "@grafana/schema";
import type {
  Dashboard,
  FieldConfig,
  Panel,
  RowPanel,
  Threshold,
  ThresholdsConfig,
} from "@grafana/schema/dist/types/raw/dashboard/x/dashboard_types.gen.d.ts";
import type { Options as Gauge } from "@grafana/schema/dist/types/raw/composable/gauge/panelcfg/x/GaugePanelCfg_types.gen.d.ts";
import type { Options as Stat } from "@grafana/schema/dist/types/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen.d.ts";
import type {
  FieldConfig as SeriesField,
  Options as Series,
} from "@grafana/schema/dist/types/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen.d.ts";

// An enum's values, as JSON has them.
type Plain<T> = T extends string ? `${T}` : T extends number ? (`${T}` extends `${infer N extends number}` ? N : T)
  : T extends object ? { [K in keyof T]: Plain<T[K]> } : T;

type Steps = Omit<ThresholdsConfig, "steps"> & { steps: (Omit<Threshold, "value"> & { value: number | null })[] };
type Field<Custom> = Omit<FieldConfig, "custom" | "thresholds"> & { custom?: Custom; thresholds?: Steps };
// Prometheus' own fields of a query are not in the package.
type Target = DataQuery & { expr: string; legendFormat: string; editorMode: "code"; instant?: boolean };
type Typed<Type, Options, Custom> = Omit<Panel, "type" | "options" | "targets" | "fieldConfig"> & {
  type: Type;
  options: Options;
  targets: Target[];
  fieldConfig: { defaults: Field<Custom>; overrides: [] };
};
type OurPanel = Typed<"stat", Stat, never> | Typed<"gauge", Gauge, never> | Typed<"timeseries", Series, SeriesField>;

export type OurDashboard = Plain<Omit<Dashboard, "panels"> & { panels: (OurPanel | RowPanel)[] }>;
