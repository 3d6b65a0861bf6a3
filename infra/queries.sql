-- What people ask of an output. Each paragraph is a question, with its title above it:
--   swath query OUTPUT --file infra/queries.sql

-- What is asked for (a class, a share, a price); change it to your own.
SET VARIABLE class = (SELECT name FROM class_stats GROUP BY name ORDER BY sum(pixels) DESC, name LIMIT 1);
SET VARIABLE share = 0.5;
SET VARIABLE dollars_an_hour = 1.0;

-- How much of everything is each class, and in how many images is it?
SELECT name, count(*) AS images, sum(pixels) AS pixels,
  sum(pixels) / (SELECT sum(width::BIGINT * height) FROM current WHERE status = 'ok') AS share,
  sum(confidence * pixels) / sum(pixels) FILTER (WHERE confidence IS NOT NULL) AS confidence
FROM class_stats GROUP BY name ORDER BY pixels DESC, name;

-- What is the share of the class in images of each run, over time?
WITH totals AS (SELECT run_id, sum(width::BIGINT * height) AS pixels FROM current WHERE status = 'ok' GROUP BY run_id),
  found AS (SELECT run_id, sum(pixels) AS pixels FROM class_stats WHERE name = getvariable('class') GROUP BY run_id)
SELECT finished, run_id, getvariable('class') AS class, coalesce(found.pixels, 0) / totals.pixels AS share
FROM totals JOIN runs USING (run_id) LEFT JOIN found USING (run_id) ORDER BY finished, run_id;

-- What is the share of the class below each folder or prefix?
WITH totals AS (
  SELECT regexp_extract(uri, '^(.*)/', 1) AS prefix, count(*) AS images, sum(width::BIGINT * height) AS pixels
  FROM current WHERE status = 'ok' GROUP BY prefix),
found AS (
  SELECT regexp_extract(uri, '^(.*)/', 1) AS prefix, sum(pixels) AS pixels
  FROM class_stats WHERE name = getvariable('class') GROUP BY prefix)
SELECT prefix, images, getvariable('class') AS class, coalesce(found.pixels, 0) / totals.pixels AS share
FROM totals LEFT JOIN found USING (prefix) ORDER BY share DESC, prefix;

-- Which images are more than so much of the class?
SELECT uri, name, fraction, confidence FROM class_stats
WHERE name = getvariable('class') AND fraction > getvariable('share') ORDER BY fraction DESC, uri;

-- Which images is the model least sure of, and should be labelled first?
SELECT uri, confidence, entropy FROM current WHERE status = 'ok' ORDER BY confidence, uri LIMIT 100;

-- Which classes is the model least sure of?
SELECT name, count(*) AS images, avg(confidence) AS confidence, quantile_cont(confidence, 0.1) AS least_tenth
FROM class_stats GROUP BY name ORDER BY confidence, name;

-- Where has each class its greatest share?
SELECT name, max(fraction) AS share, arg_min(uri, (-fraction, uri)) AS uri
FROM class_stats GROUP BY name ORDER BY share DESC, name;

-- What failed, and why? Names, identifiers and numbers in a reason are left out, so that alike ones are one.
SELECT status, reason, count(*) AS images, min(uri) AS example
FROM failures GROUP BY status, reason ORDER BY images DESC, status, reason;

-- Where does it fail: which share of the images below each folder or prefix has no mask?
SELECT regexp_extract(uri, '^(.*)/', 1) AS prefix, count(*) AS images, count(*) FILTER (WHERE status <> 'ok') AS failures,
  avg((status <> 'ok')::INT) AS share
FROM current GROUP BY prefix HAVING failures > 0 ORDER BY share DESC, prefix;

-- What has changed from the model before to the newest one: how much of each class, over the images that both have seen?
WITH versions AS (
  SELECT model_version, row_number() OVER (ORDER BY max(finished) DESC, model_version) AS age
  FROM runs GROUP BY model_version ORDER BY age LIMIT 2),
seen AS (
  SELECT uri, etag, arg_max(classes, (finished, run_id)) AS classes, age, any_value(width::BIGINT * height) AS size
  FROM segments JOIN runs USING (run_id) JOIN versions ON versions.model_version = segments.model_version
  WHERE status = 'ok' GROUP BY uri, etag, age),
both_seen AS (FROM seen SEMI JOIN (SELECT uri, etag FROM seen GROUP BY uri, etag HAVING count(*) = 2) USING (uri, etag)),
total AS (SELECT sum(size) AS size FROM both_seen WHERE age = 1),
shares AS (SELECT age, unnest(classes).name AS name, unnest(classes).pixels AS pixels FROM both_seen)
SELECT name, coalesce(sum(pixels) FILTER (WHERE age = 2), 0) / any_value(total.size) AS before,
  coalesce(sum(pixels) FILTER (WHERE age = 1), 0) / any_value(total.size) AS now, now - before AS change
FROM shares, total GROUP BY name ORDER BY abs(change) DESC, name;

-- Which images do the two see most differently: how much of an image has, at least, another class now?
WITH versions AS (
  SELECT model_version, row_number() OVER (ORDER BY max(finished) DESC, model_version) AS age
  FROM runs GROUP BY model_version ORDER BY age LIMIT 2),
seen AS (
  SELECT uri, etag, arg_max(classes, (finished, run_id)) AS classes, age
  FROM segments JOIN runs USING (run_id) JOIN versions ON versions.model_version = segments.model_version
  WHERE status = 'ok' GROUP BY uri, etag, age),
shares AS (
  SELECT uri, etag, age, unnest(classes).name AS name, unnest(classes).fraction AS fraction
  FROM seen SEMI JOIN (SELECT uri, etag FROM seen GROUP BY uri, etag HAVING count(*) = 2) USING (uri, etag)),
moved AS (
  SELECT uri, etag, name, sum(CASE age WHEN 1 THEN fraction ELSE -fraction END) AS change
  FROM shares GROUP BY uri, etag, name)
SELECT uri, sum(abs(change)) / 2 AS changed FROM moved GROUP BY uri, etag ORDER BY changed DESC, uri LIMIT 100;

-- Which classes are seen together most often?
SELECT one.name AS class, other.name AS other, count(*) AS images
FROM class_stats one JOIN class_stats other ON one.uri = other.uri AND one.name < other.name
GROUP BY ALL ORDER BY images DESC, class, other LIMIT 50;

-- At which resolutions did the network see images, and how sure was it there?
SELECT bucket, count(*) AS images, min(width) AS least_width, max(width) AS greatest_width, avg(confidence) AS confidence
FROM current WHERE status = 'ok' GROUP BY bucket ORDER BY images DESC, bucket;

-- How fast was each run, and what did it cost at a price an hour for all of its machines? (Not known of one that was
-- interrupted, as its record has the time of the last stretch alone.)
WITH whole AS (FROM runs WHERE shards_done_before = 0)
SELECT run_id, runs.model_version, runs.finished, runs.images, whole.images / whole.seconds AS images_a_second,
  whole.input_bytes / whole.seconds AS bytes_a_second, whole.seconds / 3600 * getvariable('dollars_an_hour') AS dollars,
  dollars / whole.images * 1e6 AS dollars_a_million_images
FROM runs LEFT JOIN whole USING (run_id) ORDER BY runs.finished, run_id;

-- Which images are the same file under more than one name?
SELECT etag, bytes, count(*) AS images, min(uri) AS first, max(uri) AS last
FROM current WHERE etag <> '' GROUP BY etag, bytes HAVING images > 1 ORDER BY images DESC, first;

-- What has gone from the collection, and what was in it?
SELECT uri, noticed, list_transform(classes[:3], lambda c: c.name) AS classes
FROM deletions LEFT JOIN (
  SELECT uri, arg_max(classes, (finished, segments.run_id)) AS classes
  FROM segments JOIN runs USING (run_id) GROUP BY uri) last_seen USING (uri)
ORDER BY noticed DESC, uri LIMIT 100;
