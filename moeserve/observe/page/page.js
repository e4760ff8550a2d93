"use strict";
const PERIOD_MS = 1000, MINUTE = 60, FEW = 5;
const $ = (id) => document.getElementById(id);
const number = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const sum = (list) => list.reduce((a, b) => a + b, 0);
const percent = (part) => (100 * part).toFixed(1) + " %";
const ms = (value) => value === null ? "–" : value >= 100 ? value.toFixed(0) : value.toPrecision(3);
const short = (value) => value >= 1e6 ? (value / 1e6).toFixed(2) + " M" : value >= 1e4 ? (value / 1e3).toFixed(1) + " k" : value >= 100 || value === 0 ? number.format(value) : value.toFixed(1);
const shown = /*shown*/ {};  // columns of tables, as records describe them
const history = [];  // snapshots of the last minute, the newest last
const memory = (() => { try { return localStorage; } catch { return {}; } })();  // a browser may forbid it

function make(name, attributes = {}, text = null) {
  const isSvg = ["svg", "rect", "path", "title"].includes(name);
  const element = isSvg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== null) element.textContent = text;
  return element;
}

// ---- what is worked out of snapshots ------------------------------------------------------------------------------------------
function quantile(durations, q) {  // as Prometheus' histogram_quantile
  let rank = q * sum(durations.counts), below = 0, lower = 0;
  if (!rank) return null;
  for (let i = 0; i < durations.upper_bounds_s.length; i++) {
    const count = durations.counts[i], upper = durations.upper_bounds_s[i];
    if (count && below + count >= rank) return 1000 * (lower + (upper - lower) * (rank - below) / count);
    below += count;
    lower = upper;
  }
  return 1000 * lower;
}

function less(now, base) {  // what was counted since `base`; null = all
  if (!base) return now;
  const minus = (list, old) => list.map((value, i) => value - (old ? old[i] : 0));
  const named = (list, name) => list.find((one) => one.name === name) ?? {};
  const durations = (key) => now[key].map((one) => ({ ...one, counts: minus(one.counts, named(base[key], one.name).counts) }));
  const totals = shown.layers.filter((column) => column.form === "total").map((column) => column.key);
  const layers = now.layers.map((layer, i) => {
    const old = base.layers[i], counted = Object.fromEntries(totals.map((key) => [key, layer[key] - old[key]]));
    return { ...layer, ...counted, processed: minus(layer.processed, old.processed), dropped: minus(layer.dropped, old.dropped) };
  });
  const before = (call) => base.calls.find((one) => one.method === call.method && one.code === call.code)?.count ?? 0;
  const calls = now.calls.map((call) => ({ ...call, count: call.count - before(call) }));
  return { ...now, layers, calls, requests: durations("requests"), stages: durations("stages"), uptime_s: now.uptime_s - base.uptime_s };
}

function countsOn(now, before) {  // as counts_on of summary.py: what took the place of another may have run for longer
  const grows = (list, old) => list.length === old.length && list.every((value, i) => value >= old[i]);
  const counted = (layer) => [layer.tokens, ...demand(layer)];
  const durations = (key) => before[key].every((old) => grows(now[key].find((one) => one.name === old.name)?.counts ?? [], old.counts));
  return now.uptime_s >= before.uptime_s && durations("requests") && durations("stages") && now.layers.length === before.layers.length
    && now.layers.every((layer, i) => layer.name === before.layers[i].name && grows(counted(layer), counted(before.layers[i])));
}

function remember(stats) {  // by its time: a page that nobody sees may be woken once a minute
  if (history.length && !countsOn(stats, history.at(-1))) history.length = 0;  // another service has its place
  history.push(stats);
  while (stats.uptime_s - history[0].uptime_s > MINUTE + 0.5) history.shift();
}

function lately() {  // the snapshot that rates count from
  const now = history.at(-1), first = history.find((one) => now.uptime_s - one.uptime_s < FEW + 0.5);
  return first === now ? history.at(-2) ?? now : first;
}

const demand = (layer) => layer.processed.map((value, i) => value + layer.dropped[i]);
function shares(stats, counted) {  // of each host in the rows expected on all of them: the copies of an expert share its rows
  const expected = Object.fromEntries(stats.hosts.map((host) => [host.name, 0]));
  stats.layers.forEach((layer, i) => {
    const rows = demand(counted.layers[i]), copies = new Map(), key = (held, j) => held.experts[j] * layer.tensor_parallel + held.shards[j];
    for (const held of layer.placement) held.experts.forEach((_, j) => copies.set(key(held, j), (copies.get(key(held, j)) ?? 0) + 1));
    for (const held of layer.placement) expected[held.host] = (expected[held.host] ?? 0) + sum(held.experts.map((expert, j) => rows[expert] / copies.get(key(held, j))));
  });
  const whole = sum(Object.values(expected));
  return (name) => whole ? percent(expected[name] / whole) : "–";
}

const span = (list) => Math.min(...list) === Math.max(...list) ? `${list[0]}` : `${Math.min(...list)}–${Math.max(...list)}`;
const balance = (loads) => { const most = Math.max(0, ...loads); return most ? sum(loads) / loads.length / most : 1; };
const tokens = (stats) => sum(stats.layers.map((layer) => layer.tokens));
const forwards = (stats) => stats.requests.filter((one) => /^(Forward.*|Model(Stream)?Infer)$/.test(one.name));
const calls = (stats) => sum(forwards(stats).map((one) => sum(one.counts)));
function together(list) {
  if (!list.length) return { counts: [], upper_bounds_s: [] };
  return { ...list[0], counts: list[0].counts.map((_, i) => sum(list.map((one) => one.counts[i]))) };
}

// ---- drawing ------------------------------------------------------------------------------------------------------------------
function heat(share) {  // even loads are calm; a quarter or less is cold, four times or more is hot
  const far = Math.max(-1, Math.min(1, Math.log2(share) / 2));
  return `color-mix(in oklab, var(--${far < 0 ? "cold" : "hot"}) ${(100 * Math.abs(far)).toFixed(0)}%, var(--even))`;
}

function strip(width, label) {
  return make("svg", { viewBox: `0 0 ${Math.max(1, width)} 20`, preserveAspectRatio: "none", role: "img", "aria-label": label });
}

function cell(x, y, width, height, title) {
  const rect = make("rect", { x, y, width, height });
  rect.append(make("title", {}, title));
  return rect;
}

function loadStrip(layer, loads) {
  const total = sum(loads), fair = total / loads.length, gap = loads.length > 64 ? 0.1 : 0.05;
  const hottest = loads.indexOf(Math.max(...loads));
  const said = total ? `balance ${balance(loads).toFixed(2)}, hottest expert ${hottest} with ${percent(loads[hottest] / total)}` : "no load yet";
  const svg = strip(loads.length, `${layer.name}: ${loads.length} experts, ${said}`);
  loads.forEach((load, expert) => {
    const lost = layer.dropped[expert], copies = layer.live_copies[expert];
    const title = `expert ${expert}: ${number.format(load)} asked, ${number.format(lost)} dropped` + (total ? `, ${(load / fair).toFixed(2)} of its share` : "")
      + (copies === undefined ? "" : `, ${copies} live ${copies === 1 ? "copy" : "copies"}`);
    const rect = cell(expert + gap, 0, 1 - 2 * gap, 20, title);
    if (load) rect.style.fill = heat(load / fair);
    else rect.classList.add("free");
    svg.append(rect);
    if (lost) {
      const part = cell(expert + gap, 20 - 20 * lost / load, 1 - 2 * gap, 20 * lost / load, title);
      part.classList.add("lost");
      svg.append(part);
    }
  });
  return svg;
}

function placementStrip(host, layer, count) {
  const held = layer.placement.find((one) => one.host === host.name) ?? { experts: [], shards: [] };
  const parts = Math.max(1, layer.tensor_parallel), gap = count > 64 ? 0.1 : 0.05, width = (1 - 2 * gap) / parts;
  const names = held.experts.map((expert, i) => parts > 1 ? `${expert} (shard ${held.shards[i] + 1} of ${parts})` : `${expert}`);
  const svg = strip(count, `${host.name} holds ${names.length ? "experts " + names.join(", ") : "nothing"} of ${layer.name}`);
  for (let expert = 0; expert < count; expert++) {
    const rect = cell(expert + gap, 0, 1 - 2 * gap, 20, `expert ${expert}: not here`);
    rect.classList.add("free");
    svg.append(rect);
  }
  held.experts.forEach((expert, i) => {
    const rect = cell(expert + gap + held.shards[i] * width, 0, width, 20, `expert ${names[i]}`);
    rect.classList.add(host.up ? "held" : "gone");
    svg.append(rect);
  });
  return svg;
}

function spark(values) {
  const svg = make("svg", { viewBox: "0 0 60 20", preserveAspectRatio: "none", "aria-hidden": "true" });
  const most = Math.max(1e-9, ...values), start = 60 - values.length;
  if (values.length > 1) svg.append(make("path", { d: "M" + values.map((value, i) => `${start + i} ${(19 - 18 * value / most).toFixed(2)}`).join("L") }));
  return svg;
}

function named(name) {  // cut short where it does not fit
  return make("span", { title: name }, name);
}

function rows(table, list) {  // each a list of cells: text or an element, with the class it has
  $(table).tBodies[0].replaceChildren(...list.map((cells) => {
    const row = make("tr");
    for (const [content, kind = ""] of cells) {
      const td = make("td", kind ? { class: kind } : {});
      td.append(content);
      row.append(td);
    }
    return row;
  }));
}

const isText = (column) => column.form === "name" || column.form === "text";
const MIB = 2 ** 20;
const told = {
  name: (text) => named(text || "–"), text: (text) => text || "–", count: number.format, total: number.format,
  bytes: (size) => size >= 1024 * MIB ? (size / 1024 / MIB).toFixed(1) + " GiB" : (size / MIB).toFixed(1) + " MiB",
  share: (share) => share === null ? "–" : (100 * share).toFixed(0) + "%",
};
const cells = (columns, record) => columns.map((column) => [told[column.form](record[column.key]), isText(column) ? "l" : ""]);

function addColumns(table, columns) {  // once, behind the names and the strips
  const head = $(table).tHead.rows[0], group = $(table).querySelector("colgroup"), after = head.cells[2], col = group.children[2];
  if (head.dataset.whole) return;
  head.dataset.whole = "yes";
  for (const column of columns) {
    col.before(make("col", { class: column.form === "name" ? "node" : "number" }));
    after.before(make("th", { scope: "col", class: isText(column) ? "l" : "" }, column.label[0].toUpperCase() + column.label.slice(1)));
  }
}

// ---- the parts of the page ----------------------------------------------------------------------------------------------------
function drawTiles(stats, counted) {
  const few = less(stats, lately()), seconds = few === stats ? 0 : few.uptime_s;
  const steps = history.slice(1).map((one, i) => less(one, history[i]));
  const loads = counted.layers.map(demand), latency = together(forwards(counted));
  const asked = sum(loads.map(sum)), lost = sum(counted.layers.map((layer) => sum(layer.dropped)));
  const worst = Math.min(1, ...loads.map(balance)), up = stats.hosts.filter((host) => host.up).length;
  const rate = (count) => seconds > 0 ? short(count / seconds) : "–";
  const tiles = [
    ["tokens-per-s", "tokens/s", rate(tokens(few)), steps.map((one) => tokens(one) / one.uptime_s)],
    ["requests-per-s", "requests/s", rate(calls(few)), steps.map((one) => calls(one) / one.uptime_s)],
    ["p50", "p50 ms", ms(quantile(latency, 0.5)), steps.map((one) => quantile(together(forwards(one)), 0.5) ?? 0)],
    ["p99", "p99 ms", ms(quantile(latency, 0.99)), steps.map((one) => quantile(together(forwards(one)), 0.99) ?? 0)],
    ["queue", "queued tokens", number.format(stats.queue_tokens), history.map((one) => one.queue_tokens)],
    ["dropped", "dropped", percent(asked ? lost / asked : 0), steps.map((one) => sum(one.layers.map((layer) => sum(layer.dropped))))],
    ["balance", "worst balance", worst.toFixed(2), steps.map((one) => Math.min(1, ...one.layers.map((layer) => balance(demand(layer)))))],
    ["up", "hosts up", `${up} / ${stats.hosts.length}`, history.map((one) => one.hosts.filter((host) => host.up).length)],
  ];
  $("tiles").replaceChildren(...tiles.map(([id, label, value, values]) => {
    const tile = make("div", { class: "tile" });
    tile.append(make("p", {}, label), make("strong", { id, class: id === "up" && up < stats.hosts.length ? "warn" : "" }, value), spark(values));
    return tile;
  }));
}

function drawLoad(stats, counted) {
  const few = less(stats, lately()), seconds = few === stats ? 0 : few.uptime_s;
  const most = Math.max(0, ...stats.layers.map((layer) => layer.processed.length));
  $("experts").textContent = most > 1 ? `Experts 0 … ${most - 1}` : "Experts";
  addColumns("load", shown.layers);
  rows("load", counted.layers.map((layer, i) => {
    const loads = demand(layer), total = sum(loads), lost = sum(layer.dropped), hottest = loads.indexOf(Math.max(...loads));
    return [
      [named(layer.name), "l"], [loadStrip(layer, loads)], ...cells(shown.layers, layer), [seconds > 0 ? short(few.layers[i].tokens / seconds) : "–"],
      [percent(total ? lost / total : 0)], [balance(loads).toFixed(2)],
      [layer.host_balancedness === null ? "–" : layer.host_balancedness.toFixed(2)], [span(layer.live_copies)], [total ? `${hottest}: ${(100 * loads[hottest] / total).toFixed(0)} %` : "–"],
    ];
  }));
}

function drawHosts(stats, counted) {
  const select = $("layer"), names = stats.layers.map((layer) => layer.name);
  if (select.length !== names.length || names.some((name, i) => select.options[i].textContent !== name)) select.replaceChildren(...names.map((name, i) => make("option", { value: i }, name)));
  const layer = stats.layers[Number(select.value) || 0], count = layer.live_copies.length;
  addColumns("hosts", shown.hosts);
  const share = shares(stats, counted);
  rows("hosts", stats.hosts.map((host) => {
    const held = sum(stats.layers.map((one) => one.placement.find((each) => each.host === host.name)?.experts.length ?? 0));
    const name = make("span", { class: host.up ? "dot" : "dot down" }, host.name + (host.up ? "" : " is down"));
    return [[name, host.up ? "l" : "l warn"], [placementStrip(host, layer, count)],
      ...cells(shown.hosts, host), [share(host.name)], [number.format(held)]];
  }));
  const least = Math.min(...layer.live_copies), gone = layer.live_copies.flatMap((copies, expert) => copies ? [] : [expert]);
  const whole = least === Math.max(...layer.live_copies) ? `${least}` : `at least ${least}`;
  $("copies").className = gone.length ? "warn" : "";
  $("copies").textContent = gone.length ? `no live copy of expert ${gone.slice(0, 8).join(", ")}${gone.length > 8 ? " …" : ""}`
    : `every expert has ${whole} live ${least === 1 ? "copy" : "copies"}` + (layer.tensor_parallel > 1 ? `, each in ${layer.tensor_parallel} shards` : "");
}

function drawRest(stats, counted) {
  const line = (one, kind) => [[one.name, kind], [number.format(sum(one.counts))], ...[0.5, 0.9, 0.99].map((q) => [ms(quantile(one, q))])];
  rows("latency", [...forwards(counted).map((one) => line(one, "l")), ...counted.stages.map((one) => line(one, "l quiet"))]);
  rows("calls", counted.calls.map((call) => [[call.method, "l"], [call.code, call.code === "OK" ? "l" : "l warn"], [number.format(call.count)]]));
  $("events").replaceChildren(...stats.events.toReversed().map((event) => {
    const item = make("li"), when = new Date(1000 * event.time_unix_s);
    item.append(make("time", { datetime: when.toISOString() }, when.toLocaleTimeString("en-GB")),
      make("span", { class: event.kind === "host_lost" ? "warn" : "" }, `${event.kind.replace("_", " ")}: ${event.subject}`),
      make("span", {}, event.count > 1 ? `× ${number.format(event.count)}` : ""));
    return item;
  }));
}

function draw() {
  const stats = history.at(-1);
  if (!stats) return;
  const minute = document.querySelector("input[name=period]:checked").value === "minute";
  const counted = less(stats, minute ? history[0] : null);
  drawTiles(stats, counted);
  if (!document.querySelector("td svg:hover")) {  // a tooltip would go away with what it belongs to
    drawLoad(stats, counted);
    drawHosts(stats, counted);
  }
  drawRest(stats, counted);
  const up = stats.uptime_s, unit = up >= 172800 ? [86400, "d"] : up >= 7200 ? [3600, "h"] : up >= 120 ? [60, "min"] : [1, "s"];
  $("since").textContent = `up ${Math.floor(up / unit[0])} ${unit[1]} · placement ${stats.epoch}` + (stats.changing ? `, changing: ${stats.changing}` : "")
    + shown.service.map(({ key, label }) => stats[key] ? ` · ${number.format(stats[key])} ${label}` : "").join("");
}

async function update() {
  try {
    const answer = await fetch("stats.json", { cache: "no-store", signal: AbortSignal.timeout(10 * PERIOD_MS) });
    if (!answer.ok) throw new Error(answer.status);
    const stats = await answer.json();
    remember(stats);
    const down = stats.hosts.filter((host) => !host.up).length;
    $("state").textContent = down ? `${down} of ${stats.hosts.length} hosts down` : "live";
    $("state").className = down ? "down" : "";
    draw();
  } catch (error) {
    $("state").textContent = "does not answer; below is what it said last";
    $("state").className = "down";
  }
  setTimeout(update, PERIOD_MS);
}

function theme(chosen) {
  if (chosen) document.documentElement.dataset.theme = chosen;
}

$("theme").addEventListener("click", () => {
  const isDark = (document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  theme(isDark ? "light" : "dark");
  memory["moeserve-theme"] = isDark ? "light" : "dark";
});
$("period").addEventListener("change", draw);
$("layer").addEventListener("change", draw);
theme(memory["moeserve-theme"]);
update();
