// How far an explanation can be believed: scores beside their controls, and confusion by quantile.

import { count, fixed, h, percent, signed } from "./dom.js";

// What a score stands beside: other words for the same latent, or other latents.
const CONTROLS = { random: "random words as the explanation", shuffled: "another latent’s explanation" };
const BASELINES = { random_sae: "latents of a random autoencoder", neurons: "neurons" };
const CHANCE = { "balanced accuracy": 0.5, AUROC: 0.5 };

// From 0 to 1 where the metric is a share; else what holds every number, with zero in it.
function ends(results) {
  const bounded = results.every(([, s]) => /accuracy|AUROC/.test(s.metric));
  if (bounded) return [0, 1];
  const numbers = results.flatMap(([, s]) => [s.value, s.low, s.high, ...s.beside.map((b) => b.value)].flat()).filter((n) => n !== null && n !== undefined);
  const [low, high] = [Math.min(0, ...numbers), Math.max(...numbers, 0)];
  const air = 0.06 * (high - low || 1);
  return results.every(([, s]) => s.metric === "correlation") ? [Math.min(low - air, -0.1), 1] : [low - air, high + air];
}

// Scores of the explanation in use; those of the others are named `SCORER/AUTHOR`.
export function scoresOf(latent, author = null) {
  return Object.entries(latent.scores)
    .filter(([key]) => (author === null ? !key.includes("/") : key.endsWith(`/${author}`)))
    .map(([key, score]) => [key.split("/")[0], score]);
}

// `means`: what controls reach on average in this folder, for a latent without its own; and what
// baselines do, which are other latents.
export function scorePlot(scores, means = {}) {
  scores = scores.map(([name, score]) => {
    const own = Object.entries(score.controls).map(([key, value]) => ({ key, value }));
    const lent = Object.entries(means[name] ?? {}).filter(([key]) => key in BASELINES || !own.length);
    return [name, { ...score, beside: [...own, ...lent.map(([key, mean]) => ({ key, ...mean, lent: true }))] }];
  });
  const beside = scores.flatMap(([, s]) => s.beside);
  const controls = beside.filter(({ key }) => !(key in BASELINES));
  const baselines = Object.keys(BASELINES).filter((key) => beside.some((b) => b.key === key));
  const units = new Map();
  for (const entry of scores) {
    const unit = /accuracy|AUROC/.test(entry[1].metric) ? "share" : entry[1].metric;
    units.set(unit, [...(units.get(unit) ?? []), entry]);
  }
  return h(
    "div",
    { class: "scores" },
    [...units.values()].flatMap((group) => group.map(([name, score]) => row(name, score, ends(group)))),
    beside.length > 0 &&
      h(
        "p",
        { class: "key" },
        sign("dot", "score, 95 % interval"),
        controls.length > 0 && sign("control", controls.some((c) => c.lent) ? "controls, folder’s mean" : "controls"),
        sign("chance", "chance"),
        baselines.map((key) => sign(`control ${key}`, `${BASELINES[key]}, folder’s mean`)),
      ),
  );
}

const sign = (kind, what) => h("span", { class: "sign" }, h("span", { class: kind }), what);

function row(name, score, [low, high]) {
  const at = (value) => `${(100 * Math.min(Math.max((value - low) / (high - low), 0), 1)).toFixed(2)}%`;
  const whose = ({ key, value, low, high, lent }) =>
    `${BASELINES[key] ?? CONTROLS[key] ?? key.replaceAll("_", " ")}: ${fixed(value)}${lent ? `, mean of this folder, ${fixed(low)} to ${fixed(high)}` : ""}`;
  const controls = score.beside.filter(({ key }) => !(key in BASELINES));
  const best = controls.length ? Math.max(...controls.map((c) => c.value)) : null;
  const above = best === null || score.value === null ? null : score.value - best;
  const judged = score.scored + score.unparsed;
  const about = [
    score.metric,
    `${count(score.scored)} scored`,
    score.unparsed ? `${percent(score.unparsed / Math.max(judged, 1))} unparsed` : null,
    score.auroc === null || score.metric === "AUROC" ? null : `AUROC ${fixed(score.auroc)}`,
    `read by ${score.reader}`,
  ].filter(Boolean).join(" · ");
  const told = [
    `${name}: ${fixed(score.value)}`,
    score.low === null ? null : `interval ${fixed(score.low)} to ${fixed(score.high)}`,
    ...score.beside.map(whose),
  ].filter(Boolean).join("; ");
  return h(
    "div",
    { class: "score", "data-scorer": name },
    h("span", { class: "name" }, name),
    h(
      "span",
      { class: "track", role: "img", "aria-label": told, "data-tip": told, tabindex: "0" },
      score.metric in CHANCE && h("span", { class: "chance", vars: { "--x": at(CHANCE[score.metric]) } }),
      !(score.metric in CHANCE) && low < 0 && h("span", { class: "chance", vars: { "--x": at(0) } }),
      score.low !== null && h("span", { class: "range", vars: { "--x": at(score.low), "--y": at(score.high) } }),
      score.beside.map((b) => h("span", { class: `control ${b.key in BASELINES ? b.key : b.lent ? "borrowed" : ""}`, vars: { "--x": at(b.value) }, "data-tip": whose(b) })),
      score.value !== null && h("span", { class: "dot", vars: { "--x": at(score.value) } }),
    ),
    h("span", { class: "number" }, fixed(score.value)),
    h("span", { class: "above", title: "Above its best control" }, above === null ? "" : signed(above)),
    h("span", { class: "about" }, score.note ? `${about}. ${score.note}` : about),
  );
}

const order = (group) => (/^q\d+$/.test(group) ? -Number(group.slice(1)) : 1 + ["random", "similar", "neighbour"].indexOf(group));

// Share judged right, per quantile of the active windows and per kind of the silent ones.
export function confusion(scores) {
  const judged = scores.filter(([, s]) => Object.keys(s.groups).length);
  if (!judged.length) return null;
  const groups = [...new Set(judged.flatMap(([, s]) => Object.keys(s.groups)))].sort((a, b) => order(a) - order(b) || a.localeCompare(b));
  const isActive = (group) => /^q\d+$/.test(group);
  const actives = groups.filter(isActive).length;
  const cell = (group, counts) => {
    if (!counts) return h("td", {});
    const [right, wrong] = isActive(group) ? [counts.yes, counts.no] : [counts.no, counts.yes];
    const share = right + wrong ? right / (right + wrong) : null;
    const told = `${group}: ${right} of ${right + wrong} judged right${counts.unparsed ? `, ${counts.unparsed} unparsed` : ""}`;
    if (share === null) return h("td", { "data-tip": told }, "–");
    return h(
      "td",
      { class: `cell ${share >= 0.5 ? "right" : "wrong"}`, vars: { "--a": (Math.abs(share - 0.5) * 2).toFixed(2) }, "data-tip": told, tabindex: "-1" },
      String(Math.round(100 * share)),
    );
  };
  return h(
    "div",
    { class: "scroll" },
    h(
      "table",
      { class: "confusion" },
      h("colgroup", {}, h("col", { class: "scorer" }), groups.map((g) => h("col", { class: isActive(g) ? null : "silent" }))),
      h(
        "thead",
        {},
        h("tr", {}, h("td", {}), actives > 0 && h("th", { colspan: actives, scope: "colgroup" }, "active, strongest first"), groups.length > actives && h("th", { colspan: groups.length - actives, scope: "colgroup" }, "silent")),
        h("tr", {}, h("td", {}), groups.map((g) => h("th", { scope: "col", title: g }, { random: "any", similar: "alike", neighbour: "near" }[g] ?? g))),
      ),
      h("tbody", {}, judged.map(([name, s]) => h("tr", {}, h("th", { scope: "row" }, name), groups.map((g) => cell(g, s.groups[g]))))),
    ),
  );
}
