"use strict";
const root = document.documentElement;
const theme = document.getElementById("theme");
const isDarkHere = matchMedia("(prefers-color-scheme: dark)").matches;
const isDark = () => (root.dataset.theme || (isDarkHere ? "dark" : "light")) === "dark";
const showTheme = () => theme.setAttribute("aria-pressed", String(isDark()));
theme.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  showTheme();
});
showTheme();

for (const button of document.querySelectorAll("[data-shows]")) {
  button.addEventListener("click", () => {
    button.closest("[data-view]").dataset.view = button.dataset.shows;
    for (const one of button.parentElement.children) one.setAttribute("aria-pressed", String(one === button));
  });
}

for (const slider of document.querySelectorAll(".frame input")) {
  const cut = () => slider.parentElement.style.setProperty("--cut", `${slider.value}%`);
  slider.addEventListener("input", cut);
  cut();  // a browser may have kept another value
}

addEventListener("beforeprint", () => { for (const one of document.querySelectorAll(".more, .run")) one.open = true; });
