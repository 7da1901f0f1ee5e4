// The list: filtered, sorted, and drawn only where it is seen, so that thousands stay smooth.

import { byId, count, fixed, h, number, places } from "./dom.js";

const ROW = 58; // as in page.css
const SPARE = 6;
const VERDICTS = ["undecided", "undesired", "keep"];

export class List {
  constructor(open) {
    this.open = open;
    this.all = [];
    this.shown = [];
    this.selected = null;
    this.position = 0;
    this.filter = { text: "", verdict: "", finder: "", layer: "", sort: "name", descending: false, floor: null };
    this.box = byId("list");
    this.rows = byId("rows");
    this.box.addEventListener("scroll", () => this.draw(), { passive: true });
    new ResizeObserver(() => this.draw()).observe(this.box);
    this.box.addEventListener("click", (event) => {
      const row = event.target.closest("[data-name]");
      if (row) this.open(row.dataset.name);
    });
    this.#wire();
  }

  #wire() {
    const changed = (key, read) => (event) => {
      this.filter[key] = read(event.target);
      this.refresh();
    };
    byId("search").addEventListener("input", changed("text", (e) => e.value.trim().toLowerCase()));
    byId("finder").addEventListener("change", changed("finder", (e) => e.value));
    byId("layer").addEventListener("change", changed("layer", (e) => e.value));
    byId("floor").addEventListener("input", changed("floor", (e) => (e.value === "" ? null : Number(e.value))));
    byId("sort").addEventListener("change", (event) => {
      this.filter.sort = event.target.value;
      this.filter.descending = event.target.value.startsWith("score:");
      this.refresh();
    });
    byId("order").addEventListener("click", () => {
      this.filter.descending = !this.filter.descending;
      this.refresh();
    });
    byId("clear").addEventListener("click", () => {
      Object.assign(this.filter, { text: "", verdict: "", finder: "", layer: "", floor: null });
      byId("search").value = byId("floor").value = "";
      this.#options();
      this.refresh();
    });
  }

  set(concepts) {
    this.all = concepts;
    this.#options();
    this.refresh();
  }

  replace(concept) {
    const at = this.all.findIndex((other) => other.name === concept.name);
    if (at >= 0) this.all[at] = concept;
    this.refresh();
  }

  get(name) {
    return this.all.find((concept) => concept.name === name);
  }

  get undecided() {
    return this.all.filter((concept) => concept.verdict?.value === "undecided").length;
  }

  // Where the selected one is, or, once a filter hides it, between the two where it was.
  #place() {
    const at = this.shown.findIndex((concept) => concept.name === this.selected);
    if (at < 0) return this.position - 0.5;
    return (this.position = at);
  }

  // The row so many steps away, within the list.
  // Keys come faster than concepts open, so a step goes on from where the last one leads.
  step(steps) {
    const asked = this.shown.findIndex((concept) => concept.name === this.asked);
    const from = asked < 0 ? this.#place() : asked;
    const to = steps > 0 ? Math.floor(from + steps) : Math.ceil(from + steps);
    const concept = this.shown[Math.min(Math.max(to, 0), this.shown.length - 1)];
    if (concept) this.open(concept.name);
  }

  // The next undecided one after the selected, around the end.
  nextUndecided() {
    const after = Math.floor(this.#place()) + 1;
    const around = [...this.shown.slice(after), ...this.shown.slice(0, after)];
    return around.find((concept) => concept.verdict?.value === "undecided" && concept.name !== this.selected)?.name;
  }

  select(name) {
    this.selected = name;
    if (this.asked === name) this.asked = null;
    const at = this.#place();
    if (Number.isInteger(at)) {
      const top = at * ROW;
      if (top < this.box.scrollTop) this.box.scrollTop = top;
      else if (top + ROW > this.box.scrollTop + this.box.clientHeight) this.box.scrollTop = top + ROW - this.box.clientHeight;
    }
    this.draw();
  }

  #options() {
    const of = (key) => [...new Set(this.all.flatMap(key))];
    const finders = of((c) => c.finder ?? []).sort();
    const layers = of((c) => Object.keys(c.sites ?? {})).sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
    const scores = of((c) => Object.keys(c.scores ?? {})).sort();
    fillSelect("finder", [["", "Any finder"], ...finders.map((f) => [f, f])], this.filter.finder);
    fillSelect("layer", [["", "Any layer"], ...layers.map((s) => [s, places([s])])], this.filter.layer);
    const sorts = [["name", "By name"], ["verdict", "By verdict"], ["finder", "By finder"], ["layer", "By layer"]];
    fillSelect("sort", [...sorts, ...scores.map((s) => [`score:${s}`, s.replaceAll("_", " ")])], this.filter.sort);
  }

  refresh() {
    const { text, verdict, finder, layer, sort, descending, floor } = this.filter;
    const score = sort.startsWith("score:") ? sort.slice(6) : null;
    const fits = (c) =>
      (!text || `${c.name} ${c.explanation ?? ""}`.toLowerCase().includes(text)) &&
      (!finder || c.finder === finder) &&
      (!layer || (c.sites && layer in c.sites)) &&
      (floor === null || !score || (scoreOf(c, score) ?? -Infinity) >= floor);
    const fitting = this.all.filter(fits);
    this.shown = fitting.filter((c) => !verdict || c.verdict?.value === verdict);
    const keys = {
      name: (c) => c.name,
      verdict: (c) => VERDICTS.indexOf(c.verdict?.value),
      finder: (c) => c.finder ?? "",
      layer: (c) => Object.keys(c.sites ?? {}).join(),
    };
    const key = score ? (c) => scoreOf(c, score) : keys[sort];
    const compare = new Intl.Collator("en", { numeric: true }).compare;
    const way = descending ? -1 : 1;
    this.shown.sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if ((x ?? null) === null || (y ?? null) === null) return ((x ?? null) === null) - ((y ?? null) === null) || compare(a.name, b.name);
      return way * (typeof x === "number" ? x - y : compare(x, y)) || compare(a.name, b.name);
    });
    this.score = score ?? (this.all.some((c) => c.scores && "detection" in c.scores) ? "detection" : null);
    byId("order").textContent = descending ? "↓" : "↑";
    byId("order").title = descending ? "Largest first" : "Smallest first";
    byId("floor").parentElement.hidden = !score;
    byId("floor-name").textContent = "at least";
    byId("none").hidden = this.shown.length > 0;
    this.#chips(fitting);
    this.#place(); // remembered, for when the next filter hides it
    this.draw(true);
  }

  #chips(fitting) {
    const chip = (value, label) => {
      const n = value ? fitting.filter((c) => c.verdict?.value === value).length : fitting.length;
      return h(
        "button",
        { type: "button", "aria-pressed": String(this.filter.verdict === value), "data-value": value || "all", onclick: () => this.only(value) },
        label, " ", h("span", {}, count(n)),
      );
    };
    const focused = document.activeElement?.dataset?.value;
    byId("verdicts").replaceChildren(chip("", "all"), chip("undecided", "undecided"), chip("undesired", "undesired"), chip("keep", "keep"));
    if (focused) byId("verdicts").querySelector(`[data-value="${CSS.escape(focused)}"]`)?.focus();
  }

  only(verdict) {
    this.filter.verdict = verdict;
    this.refresh();
  }

  draw(whole = false) {
    const first = Math.max(Math.floor(this.box.scrollTop / ROW) - SPARE, 0);
    const last = Math.min(Math.ceil((this.box.scrollTop + this.box.clientHeight) / ROW) + SPARE, this.shown.length);
    const key = `${first} ${last} ${this.selected}`;
    if (!whole && key === this.drawn) return;
    this.drawn = key;
    this.rows.style.setProperty("height", `${this.shown.length * ROW}px`);
    this.rows.replaceChildren(...this.shown.slice(first, last).map((concept, i) => this.#row(concept, first + i)));
    const here = this.selected && byId(`row-${this.selected}`);
    if (here) this.box.setAttribute("aria-activedescendant", here.id);
    else this.box.removeAttribute("aria-activedescendant");
  }

  #row(concept, at) {
    const value = this.score ? scoreOf(concept, this.score) : null;
    const about = concept.problem ?? (brief(concept) || `${concept.finder}, ${places(Object.keys(concept.sites))}`);
    return h(
      "div",
      {
        class: `row${concept.problem ? " broken" : ""}`, role: "option", id: `row-${concept.name}`, "data-name": concept.name,
        "aria-selected": String(concept.name === this.selected), "aria-posinset": at + 1, "aria-setsize": this.shown.length,
        vars: { "--top": `${at * ROW}px` },
      },
      h("span", { class: `mark ${concept.verdict?.value ?? "broken"}`, role: "img", "aria-label": concept.verdict?.value ?? "cannot be read" }),
      h("span", { class: "name" }, concept.name),
      h("span", { class: "value", title: this.score?.replaceAll("_", " ") }, value === null || value === undefined ? "" : Math.abs(value) < 10 ? fixed(value) : number(value)),
      h("span", { class: `about${concept.explanation || concept.problem ? "" : " unexplained"}`, dir: "auto" }, about),
    );
  }
}

// An explainer's text of several ends, such as "layer:3/0 high: A; layer:3/0 low: B", without what
// only tells them apart: the first is read as it is.
function brief({ explanation, explained_by: by }) {
  if (!explanation || !/^explainer\b/.test(by)) return explanation;
  return explanation.replace(/(^|; )\S+\/\d+ (?=(high|low): )/g, "$1").replace(/^high: /, "");
}

// A score is one number, or one per site: then the largest.
export function scoreOf(concept, name) {
  const score = concept.scores?.[name];
  if (typeof score === "number") return score;
  const values = Object.values(score ?? {});
  return values.length ? Math.max(...values) : null;
}

function fillSelect(id, options, chosen) {
  const select = byId(id);
  select.replaceChildren(...options.map(([value, label]) => h("option", { value }, label)));
  select.value = options.some(([value]) => value === chosen) ? chosen : options[0][0];
}
