// What a latent is active on: windows of text with its tokens marked, its histogram, generations.

import { count, fixed, h, number, percent, plural, signed, svg, visible } from "./dom.js";

const KINDS = {
  similar: ["Silent, though alike", "Windows whose text is like the active ones, but where it is silent."],
  neighbour: ["Silent, a neighbour active", "Windows where a neighbouring latent is active and this one is not."],
  random: ["Silent, drawn at random", "Windows where it is silent."],
};

// One line of text; `values` beside `pieces` from 0 to `most`, of either sign.
export function marked(pieces, values, most, told = (value) => number(value)) {
  const nodes = pieces.map((whole, i) => {
    const value = values[i];
    const piece = i === 0 ? whole.replace(/^ +(?=.)/, "") : whole;
    if (!piece || !value) return visible(piece);
    const strength = Math.min(Math.abs(value) / (most || 1), 1);
    const space = /^ */.exec(piece)[0]; // unmarked, or a line would end in the colour of the next
    const word = h(
      "mark",
      { class: value > 0 ? "plus" : "minus", "data-tip": told(value, i), vars: { "--a": strength.toFixed(3) } },
      visible(piece.slice(space.length) || piece),
    );
    return piece.length > space.length ? [space, word] : word;
  });
  return h("span", { class: "text", dir: "auto" }, nodes);
}

const height = (value) => fixed(value, Math.abs(value) < 10 ? 2 : Math.abs(value) < 100 ? 1 : 0);

function line(example, end, most) {
  return h(
    "li",
    { class: "window", tabindex: "-1" },
    h("span", { class: "peak", title: `peak ${number(example.peak)}, row ${example.row}, token ${example.start}` }, example.peak ? height(example.peak) : ""),
    marked(example.pieces, example.activations.map((a) => a * end.sign), most, (value) => number(Math.abs(value), 4)),
    example.seen && h("span", { class: "seen", title: "The explainer saw this window; the scorers did not." }, "seen"),
  );
}

// The first few of a list, and a button for the rest.
function some(items, few, draw) {
  const list = h("ol", { class: "windows" }, items.slice(0, few).map(draw));
  if (items.length <= few) return [list];
  const rest = () => {
    list.append(...items.slice(few).map(draw));
    list.children[few].focus({ preventScroll: true });
    more.remove();
  };
  const more = h("button", { type: "button", class: "plain more", onclick: rest }, `${count(items.length - few)} more`);
  return [list, more];
}

export function examplesOf(latent) {
  const read = (example, seen) => ({ ...example, seen, peak: Math.max(...example.activations, 0) });
  return [...latent.shown.map((e) => read(e, true)), ...latent.scored.map((e) => read(e, false))];
}

// Active windows, a group per quantile, the strongest first.
export function activeWindows(end, examples, held) {
  const active = examples
    .filter((e) => e.kind === "activating" && (held === "all" || (held === "seen") === e.seen))
    .sort((a, b) => b.peak - a.peak);
  const most = Math.max(...examples.map((e) => e.peak), 0);
  const quantiles = [...new Set(active.map((e) => e.quantile))].sort((a, b) => (b ?? 0) - (a ?? 0));
  const top = quantiles[0];
  const bottom = quantiles.at(-1);
  if (!active.length) return [h("p", { class: "empty" }, "No active window here.")];
  return quantiles.map((q) => {
    const windows = active.filter((e) => e.quantile === q);
    const which = q === null ? "" : q === top ? "strongest" : q === bottom ? "weakest" : "";
    return h(
      "section",
      { class: "quantile" },
      h("h4", {}, q === null ? "active" : `q${q}`, which && h("span", {}, ` ${which}`)),
      h("div", {}, ...some(windows, q === top ? 5 : 2, (e) => line(e, end, most))),
    );
  });
}

export function silentWindows(end, examples) {
  return Object.entries(KINDS).flatMap(([kind, [title, about]]) => {
    const windows = examples.filter((e) => e.kind === kind);
    if (!windows.length) return [];
    return h(
      "section",
      { class: "quantile silent", "data-kind": kind },
      h("h4", { title: about }, title, h("span", {}, ` ${count(windows.length)}`)),
      h("div", {}, ...some(windows, 3, (e) => line(e, end, 1))),
    );
  });
}

// What `narrowly find` read, where nothing was explained: one peak per window.
export function readWindows(end) {
  const contexts = end.sign > 0 ? end.reading.highest : end.reading.lowest;
  const above = (c) => end.sign * (c.projection - end.reading.centre);
  const most = Math.max(...contexts.map(above), 1e-9);
  const draw = (c) =>
    h(
      "li",
      { class: "window", tabindex: "-1" },
      h("span", { class: "peak", title: `row ${c.row}, token ${c.token}` }, height(c.projection)),
      marked([c.before, c.peak, c.after], [0, end.sign * Math.max(above(c), most / 4), 0], most, () => fixed(c.projection, 3)),
    );
  return some(contexts, 8, draw);
}

// How often it is how active; counts on a logarithmic scale, for they span orders of magnitude.
export function histogram(histogram, sign) {
  const { edges, counts, silent } = histogram;
  const [width, tall] = [360, 84];
  const high = Math.log1p(Math.max(...counts, 1));
  const step = width / counts.length;
  const bars = counts.map((n, i) =>
    svg(
      "rect",
      {
        x: (i * step + 0.5).toFixed(2), width: Math.max(step - 1, 0.5).toFixed(2), y: (tall - (tall * Math.log1p(n)) / high).toFixed(2),
        height: ((tall * Math.log1p(n)) / high).toFixed(2), class: sign > 0 ? "plus" : "minus",
        "data-tip": `${number(edges[i])} to ${number(edges[i + 1])}: ${plural(n, "token")}`,
      },
    ),
  );
  const active = counts.reduce((a, b) => a + b, 0);
  return h(
    "figure",
    { class: "histogram" },
    svg("svg", { viewBox: `0 0 ${width} ${tall}`, preserveAspectRatio: "none", role: "img", "aria-label": `Histogram of ${plural(active, "active token")}` }, bars),
    h("div", { class: "axis" }, h("span", {}, height(edges[0])), h("span", {}, height(edges.at(-1)))),
    h("figcaption", {}, `Active at ${percent(active / Math.max(active + silent, 1))} of ${count(active + silent)} tokens. Counts on a log scale.`),
  );
}

// What the model writes with the direction added, removed, or left.
export function generations(list, sign) {
  const prompts = [...new Set(list.map((g) => g.prompt))];
  return prompts.map((prompt) => {
    const rows = list
      .filter((g) => g.prompt === prompt)
      .sort((a, b) => a.removed - b.removed || a.strength - b.strength);
    const most = Math.max(...rows.map((g) => Math.abs(g.strength)), 1);
    return h(
      "section",
      { class: "generation" },
      h("h4", { dir: "auto" }, visible(prompt)),
      h(
        "dl",
        {},
        rows.map((g) => {
          const kind = g.removed ? "removed" : g.strength === 0 ? "as it is" : `${signed(g.strength, g.strength % 1 ? 1 : 0)}×`;
          const hue = g.removed || g.strength === 0 ? "" : g.strength * sign > 0 ? "plus" : "minus";
          return h(
            "div",
            {},
            h("dt", { class: `${hue}${g.removed ? " removed" : ""}`, vars: { "--a": (Math.abs(g.strength) / most).toFixed(2) } }, kind),
            h("dd", { dir: "auto" }, visible(g.text, true)),
          );
        }),
      ),
    );
  });
}

// Tokens that the direction makes likelier and less likely, as it would be read out.
export function promoted(end) {
  const [more, less] = end.sign > 0 ? [end.reading.promoted, end.reading.suppressed] : [end.reading.suppressed, end.reading.promoted];
  const column = (title, tokens) => {
    const most = Math.max(...tokens.map(([, logit]) => Math.abs(logit)), 1e-9);
    return h(
      "div",
      {},
      h("h4", {}, title),
      h(
        "ol",
        { class: "tokens" },
        tokens.map(([token, logit]) =>
          h(
            "li",
            { vars: { "--w": `${((100 * Math.abs(logit)) / most).toFixed(1)}%` } },
            h("bdi", {}, token.startsWith(" ") && h("i", {}, "·"), visible(token.replace(/^ (?=.)/, ""))),
            h("span", {}, signed(logit * end.sign, 1)),
          ),
        ),
      ),
    );
  };
  return h("div", { class: "promoted" }, column("promotes", more), column("suppresses", less));
}
