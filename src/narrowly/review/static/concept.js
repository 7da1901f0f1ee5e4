// One concept: its meaning, its ends, and the evidence for the end that is chosen.

import { api } from "./api.js";
import { byId, count, fixed, h, number, percent, place, places, plural, signed, toast, visible } from "./dom.js";
import { activeWindows, examplesOf, generations, histogram, promoted, readWindows, silentWindows } from "./evidence.js";
import { confusion, scorePlot, scoresOf } from "./scores.js";
import { typed } from "./typed.js";

// Ends that can be looked at, from what was explained and, where nothing was, from what was read.
export function endsOf(detail) {
  const readings = new Map(detail.reading.map((r) => [`${r.site} ${r.direction}`, r]));
  const ends = (detail.explained?.latents ?? []).map((latent, index) => ({
    key: latent.latent, site: latent.site, direction: latent.direction, sign: latent.sign,
    twoEnded: /[+-]$/.test(latent.latent), latent, index, reading: readings.get(`${latent.site} ${latent.direction}`),
  }));
  const explained = new Set(ends.map((end) => `${end.site} ${end.direction}`));
  for (const [where, reading] of readings)
    if (!explained.has(where))
      for (const sign of [1, -1])
        ends.push({ key: `${where}${sign}`, site: reading.site, direction: reading.direction, sign, twoEnded: true, reading });
  const place = (end) => `${end.site} ${end.direction} ${end.twoEnded ? "" : end.key}`;
  return ends.sort((a, b) => place(a).localeCompare(place(b), "en", { numeric: true }) || b.sign - a.sign);
}

const together = (a, b) => a.site === b.site && a.direction === b.direction && (a.twoEnded || a.key === b.key);
export const endName = (end) => (!end.twoEnded ? "Latent" : end.sign > 0 ? "High end" : "Low end");

export class ConceptView {
  constructor(verdictOf, onWord) {
    Object.assign(this, { verdictOf, onWord });
    this.held = "all";
    this.preferred = new Map(); // the end that was last looked at, by concept
  }

  async show(concept, live) {
    this.aborted?.abort();
    this.aborted = new AbortController();
    const { signal } = this.aborted;
    this.live = live;
    const main = byId("concept");
    try {
      this.detail = await api.concept(concept.name, signal);
    } catch (error) {
      if (error.name === "AbortError") return null;
      main.replaceChildren(h("div", { class: "problem", role: "alert" }, h("h2", {}, concept.name), h("p", {}, error.message)));
      return null;
    }
    this.ends = endsOf(this.detail);
    const before = this.preferred.get(concept.name);
    this.end = this.ends.find((end) => end.key === before) ?? best(this.ends);
    this.examples = null;
    this.typed?.stop();
    this.typed = null;
    main.replaceChildren(this.#head(), ...this.#body());
    main.scrollTop = 0;
    await this.#evidence();
    return this.detail;
  }

  // Text that was changed elsewhere, without touching what is being read.
  retell(concept) {
    if (this.detail?.name !== concept.name) return;
    const reworded = concept.explanation !== this.detail.explanation;
    Object.assign(this.detail, concept);
    if (!byId("meaning-edit")) byId("meaning")?.replaceWith(this.#meaning());
    if (reworded) byId("ends")?.replaceWith(this.#ends());
  }

  step(steps) {
    const at = this.ends?.indexOf(this.end) ?? -1;
    const to = this.ends?.[at + steps];
    if (to) this.choose(to);
  }

  async choose(end) {
    this.end = end;
    this.preferred.set(this.detail.name, end.key);
    this.examples = null;
    byId("ends").replaceWith(this.#ends());
    this.typed?.redraw();
    await this.#evidence();
  }

  #head() {
    const { provenance, sites, finder, name, problems } = this.detail;
    const ranks = [...new Set(Object.values(sites))];
    const rank = Math.max(...ranks) > 1 ? `, rank ${ranks.join(", ")}` : "";
    return h(
      "header",
      { class: "head" },
      h("p", { class: "kicker" }, `${finder} · ${places(Object.keys(sites))}${rank} · ${provenance.model}`),
      h("h2", { id: "name" }, name),
      this.#meaning(),
      problems.map((problem) => h("p", { class: "problem", role: "alert" }, problem)),
    );
  }

  #meaning() {
    const { explanation, explained_by: by } = this.detail;
    const apart = this.ends?.filter((end) => end.latent).length > 1;
    if (/^explainer\b/.test(by) && apart)
      return h(
        "div",
        { id: "meaning", class: "meaning" },
        h("p", { class: "author" }, `Explained end by end, by ${by.replace(/^explainer: /, "")}. `, h("button", { type: "button", class: "plain", id: "edit", onclick: () => this.edit(), title: "What the concept means as a whole (e)" }, "Say it in your own words")),
      );
    const long = explanation.length > 160;
    const clamped = explanation.length > (this.ends.length > 1 ? 160 : 640);
    const words = h("p", { class: `words${explanation ? "" : " none"}${long ? " long" : ""}${clamped ? " clamped" : ""}`, dir: "auto" }, explanation ? visible(explanation, true) : "Not explained yet.");
    const whole = h("button", { type: "button", class: "plain", onclick: () => { words.classList.remove("clamped"); whole.remove(); } }, "All of it");
    return h(
      "div",
      { id: "meaning", class: "meaning" },
      words,
      h("p", { class: "author" }, by && `by ${by.replace(/^explainer: /, "")} `, h("button", { type: "button", class: "plain", id: "edit", onclick: () => this.edit(), title: "Say it in your own words (e)" }, explanation ? "Edit" : "Explain"), clamped && [" · ", whole]),
    );
  }

  // The explanation in a field; `save` answers false where it was not written.
  edit(text = this.detail.explanation, version = this.detail.versions.explanation) {
    if (byId("meaning-edit")) return byId("meaning-edit").focus();
    const field = h("textarea", { id: "meaning-edit", rows: 3, dir: "auto", "aria-label": "Explanation", maxlength: 10000 });
    field.value = text;
    const done = () => {
      byId("meaning").replaceWith(this.#meaning());
      byId("edit")?.focus();
    };
    const save = async () => (await this.onWord(this.detail.name, field.value, version)) && done();
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") done();
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) save();
      event.stopPropagation();
    });
    byId("meaning").replaceChildren(
      field,
      h("p", { class: "author" }, h("button", { type: "button", class: "solid", onclick: save }, "Save"), " ", h("button", { type: "button", onclick: done }, "Cancel"), h("span", {}, " Ctrl ↵ saves, Esc leaves it as it was")),
    );
    field.focus();
    field.select();
  }

  #body() {
    if (!this.ends.length)
      return [
        h("p", { class: "empty" }, "Nobody has read this concept yet. ", h("code", {}, "narrowly explain"), " shows what it is active on."),
        h("div", { class: "columns" }, h("div", { class: "evidence" }), h("aside", { class: "side" }, ...this.#facts())),
      ];
    return [this.#ends(), h("div", { class: "columns" }, h("div", { id: "evidence", class: "evidence" }), h("aside", { id: "side", class: "side" }))];
  }

  #ends() {
    const groups = this.ends.filter((end, i) => this.ends.findIndex((other) => together(end, other)) === i);
    const here = this.ends.filter((end) => together(end, this.end));
    const several = new Set(groups.map((g) => g.direction)).size > 1;
    const tab = (group) =>
      h(
        "button",
        { type: "button", "aria-pressed": String(together(group, this.end)), onclick: () => this.choose(this.ends.find((end) => together(end, group) && end.sign === this.end.sign) ?? group) },
        place(group.site) + (several ? `, ${group.direction}` : ""),
      );
    return h(
      "div",
      { id: "ends", class: "ends" },
      groups.length > 1 && h("div", { class: "places", role: "group", "aria-label": "Where" }, groups.map(tab)),
      h("div", { class: `cards n${here.length}` }, here.map((end) => this.#card(end))),
    );
  }

  #card(end) {
    const { latent } = end;
    const explanation = latent?.explanations[0];
    const scores = latent ? scoresOf(latent).filter(([, s]) => s.value !== null) : [];
    const told = explanation?.text === this.detail.explanation; // above, in larger letters
    const words = latent?.skipped ? `Not explained: ${latent.skipped}` : (explanation?.text ?? (latent ? "Not explained." : "Read, not explained."));
    return h(
      "button",
      { type: "button", class: `card ${end.sign > 0 ? "plus" : "minus"}`, "aria-pressed": String(end === this.end), "data-latent": end.key, onclick: () => this.choose(end) },
      h("span", { class: "which" }, endName(end), latent && h("span", {}, ` active in ${plural(latent.windows, "window")}, ${percent(latent.tokens / Math.max(latent.of_tokens, 1))} of tokens`)),
      !told && h("span", { class: `says${explanation && !latent.skipped ? "" : " none"}`, dir: "auto" }, visible(words, true)),
      explanation?.note && h("span", { class: "caveat" }, explanation.note),
      h("span", { class: "brief" }, explanation && `${explanation.by} `, scores.slice(0, 4).map(([name, s]) => h("span", {}, `${name} `, h("b", {}, fixed(s.value))))),
    );
  }

  async #evidence() {
    if (!this.end) return;
    const { end } = this;
    const { signal } = this.aborted;
    if (end.latent && !this.examples) {
      byId("evidence").setAttribute("aria-busy", "true");
      try {
        this.full = await api.latent(this.detail.name, end.index, signal);
      } catch (error) {
        if (error.name !== "AbortError") toast(error.message);
        return;
      }
      if (this.end !== end) return; // another was chosen meanwhile
      this.examples = examplesOf(this.full);
    }
    this.typed ??= typed(this);
    byId("evidence").replaceChildren(this.typed.element, ...this.#windows(), ...this.#generations());
    byId("evidence").removeAttribute("aria-busy");
    byId("side").replaceChildren(...this.#side());
    this.typed.redraw();
  }

  // How strong an activation of an end can be, for the shade of a token.
  scale(end) {
    if (end === this.end && this.examples) return Math.max(...this.examples.map((e) => e.peak), 0);
    if (end.latent) return end.latent.histogram?.edges.at(-1) ?? 0;
    const contexts = end.sign > 0 ? end.reading?.highest : end.reading?.lowest;
    return Math.max(...(contexts ?? []).map((c) => end.sign * (c.projection - end.reading.centre)), 0);
  }

  endsHere() {
    return this.ends.filter((end) => together(end, this.end));
  }

  #windows() {
    const { end } = this;
    if (!end.latent) return [block(`Where it is ${end.sign > 0 ? "highest" : "lowest"}`, "The projection at each peak; one window per row of text.", ...readWindows(end))];
    const held = (value, label, title) => h("button", { type: "button", "aria-pressed": String(this.held === value), title, onclick: () => { this.held = value; active.replaceChildren(...activeWindows(end, this.examples, value)); for (const b of choice.children) b.setAttribute("aria-pressed", String(b.dataset.held === value)); }, "data-held": value }, label);
    const choice = h("div", { class: "chips", role: "group", "aria-label": "Which windows" }, held("all", "all", "Every window kept"), held("unseen", "held out", "Windows that only the scorers used"), held("seen", "seen by the explainer", "Windows that the explainer saw"));
    const active = h("div", { class: "windows-of" }, activeWindows(end, this.examples, this.held));
    const silent = silentWindows(end, this.examples);
    return [
      block("Where it is active", null, choice, active),
      ...(silent.length ? [block("Where it is not", null, h("div", { class: "windows-of" }, silent))] : []),
    ];
  }

  #generations() {
    if (!this.full?.generations.length || !this.end.latent) return [];
    return [block("What the model writes with it", "Added along the direction, in units of its typical activation, or removed.", ...generations(this.full.generations, this.end.sign))];
  }

  #side() {
    const { end } = this;
    const parts = [];
    if (end.latent) {
      const scores = scoresOf(end.latent);
      if (scores.length) parts.push(block("Can it be believed?", null, scorePlot(scores, this.detail.controls)));
      const table = confusion(scores);
      if (table) parts.push(block("Judged right, percent", null, table));
      parts.push(...this.#others());
    }
    if (end.reading) parts.push(block("Tokens", null, promoted(end)));
    if (end.latent?.histogram) parts.push(block("Activations", null, histogram(end.latent.histogram, end.sign)));
    return [...parts, ...this.#facts()];
  }

  // Further explanations of the same end, each with its own scores.
  #others() {
    const [first, ...others] = this.end.latent.explanations;
    const told = others.map((other) =>
      h("div", { class: "other" }, h("p", { dir: "auto" }, visible(other.text)), h("p", { class: "author" }, `${other.by} `, scoresOf(this.end.latent, other.by).map(([name, s]) => h("span", {}, `${name} `, h("b", {}, fixed(s.value)), " ")))),
    );
    const rule = Object.entries(first?.weights ?? {}).sort((a, b) => Math.abs(b[1]) - Math.abs(a[1])).slice(0, 12);
    return [
      ...(told.length ? [block("Other explanations", null, ...told)] : []),
      ...(rule.length ? [block("As a rule", "Log odds of each word for activation, in nats.", h("ul", { class: "rule" }, rule.map(([word, w]) => h("li", {}, h("bdi", {}, visible(word)), h("span", {}, signed(w, 1))))))] : []),
    ];
  }

  #facts() {
    const { scores, nearest, provenance, explained } = this.detail;
    const shares = [["difference_share", "of the change"], ["norm_share", "of the norm"]].filter(([key]) => key in scores);
    const sites = Object.keys(this.detail.sites);
    const rest = Object.entries(scores).filter(([key]) => !/_share$/.test(key));
    const at = (value, site) => (typeof value === "number" ? value : value[site]);
    return [
      shares.length > 0 &&
        block(
          "Share of the activations",
          null,
          h(
            "table",
            { class: "shares" },
            h("thead", {}, h("tr", {}, h("td", {}), shares.map(([, label]) => h("th", { scope: "col" }, label)))),
            h("tbody", {}, sites.map((site) => h("tr", {}, h("th", { scope: "row" }, place(site)), shares.map(([key]) => h("td", { vars: { "--w": `${(100 * Math.min(at(scores[key], site) ?? 0, 1)).toFixed(2)}%` } }, at(scores[key], site) === undefined ? "–" : percent(at(scores[key], site))))))),
          ),
        ),
      nearest.length > 0 &&
        block(
          "Nearest concepts",
          null,
          h("ul", { class: "nearest" }, nearest.map((near) => h("li", {}, h("span", { class: `mark ${this.verdictOf(near.name)}` }), h("a", { href: `#${near.name}`, title: `at ${place(near.site)}` }, near.name), h("span", {}, signed(near.cosine))))),
        ),
      block(
        "Where it comes from",
        null,
        h(
          "dl",
          { class: "facts" },
          rest.map(([key, value]) => [h("dt", {}, key.replaceAll("_", " ")), h("dd", {}, typeof value === "number" ? number(value) : Object.entries(value).map(([site, n]) => h("span", {}, `${number(n)} `, h("small", {}, place(site)), " ")))]),
          h("dt", {}, "found"), h("dd", {}, `by ${provenance.finder}, ${provenance.created.slice(0, 10)}`),
          explained && [h("dt", {}, "explained on"), h("dd", {}, `${explained.data || "a text set"}, seed ${count(explained.seed)}`)],
        ),
      ),
    ].filter(Boolean);
  }
}

// Where to look first: the end that is explained best, else the first one.
function best(ends) {
  const detection = (end) => (end.latent ? (Object.values(end.latent.scores)[0]?.value ?? (end.latent.skipped ? -1 : 0)) : -2);
  return ends.reduce((top, end) => (top === undefined || detection(end) > detection(top) ? end : top), undefined);
}

function block(title, about, ...content) {
  return h("section", { class: "block" }, h("h3", {}, title), about && h("p", { class: "hint" }, about), ...content);
}
