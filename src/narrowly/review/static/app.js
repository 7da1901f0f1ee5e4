// The page: which concept is open, what is decided, which key does what.

import { api, Conflict, onTold, tellOthers } from "./api.js";
import { ConceptView } from "./concept.js";
import { byId, count, dialog, h, plural, toast } from "./dom.js";
import { List } from "./list.js";
import { enterExamples, walk } from "./tip.js";

const state = { recipe: null, live: false, note: null };
const list = new List(open);
const view = new ConceptView((name) => list.get(name)?.verdict?.value ?? "broken", word);

async function refresh() {
  const answer = await api.concepts();
  Object.assign(state, { recipe: answer.recipe, live: answer.live });
  byId("folder").textContent = answer.folder;
  document.title = `${answer.folder.split("/").filter(Boolean).at(-1) ?? "concepts"}: narrowly review`;
  list.set(answer.concepts);
  tell();
}

function tell() {
  const readable = list.all.filter((concept) => concept.verdict).length;
  const left = list.undecided;
  byId("left").textContent = left ? `${count(left)} of ${count(readable)} left` : `all ${plural(readable, "concept")} decided`;
  byId("progress").value = readable ? (readable - left) / readable : 1;
  byId("copy").disabled = !list.all.some((concept) => concept.verdict?.value === "undesired");
}

// The address holds the open concept, so that the browser's back goes back.
function open(name) {
  list.asked = name;
  if (location.hash === `#${name}`) show(name);
  else location.hash = name;
}

async function show(name) {
  await leaveNote();
  const concept = list.get(name);
  if (!concept) return;
  document.body.dataset.view = "concept";
  list.select(name);
  byId("decide").hidden = Boolean(concept.problem);
  state.note = null;
  fillDecision(concept);
  const detail = await view.show(concept, state.live);
  // What was decided while it was read is newer than what was read.
  if (detail && list.selected === name && list.get(name) === concept) adopt(detail, false);
}

// Takes in a concept as the server has it now.
function adopt(concept, retell = true) {
  list.replace(pick(concept));
  if (retell) view.retell(concept);
  if (list.selected === concept.name) fillDecision(concept);
  tell();
}

const KEYS_OF_A_LINE = ["name", "explanation", "explained_by", "verdict", "scores", "sites", "finder", "versions"];
const pick = (concept) => Object.fromEntries(KEYS_OF_A_LINE.map((key) => [key, concept[key]]));

function fillDecision(concept) {
  if (!concept.verdict) return;
  for (const button of document.querySelectorAll("[data-verdict]")) {
    const chosen = button.dataset.verdict === concept.verdict.value;
    button.setAttribute("aria-checked", String(chosen));
    button.tabIndex = chosen ? 0 : -1;
  }
  // A note that is being typed stays; saving it finds out whether it is still about this verdict.
  if (state.note === null) byId("note").value = concept.verdict.why;
  const { by } = concept.verdict;
  byId("saved").textContent = state.note !== null ? "not saved yet" : by ? `by ${by}` : "";
}

const current = () => list.get(list.selected);

async function decide(value, why = byId("note").value) {
  const concept = current();
  if (!concept?.verdict) return;
  const seen = state.note ?? concept.versions.verdict;
  state.note = null;
  byId("saved").textContent = "saving…";
  try {
    adopt(await api.decide(concept.name, value, why, seen));
    byId("saved").textContent = "saved";
    tellOthers(concept.name);
  } catch (error) {
    if (error instanceof Conflict) settleVerdict(error.concept, value, why);
    else failed(error);
  }
}

function failed(error) {
  byId("saved").textContent = "not saved";
  toast(error.message);
}

// The note is saved when it is left or Enter is pressed.
async function leaveNote() {
  const concept = current();
  if (state.note !== null && concept?.verdict) await decide(concept.verdict.value);
}

async function word(name, text, version) {
  try {
    adopt(await api.word(name, text, version));
    tellOthers(name);
    return true;
  } catch (error) {
    if (error instanceof Conflict) settleExplanation(error.concept, text);
    else toast(error.message);
    return false;
  }
}

// Two tabs, one concept: both sides are shown, and a person chooses.
function settleVerdict(theirs, value, why) {
  adopt(theirs);
  const verdict = (title, v, note) => h("div", { class: "side-of" }, h("h3", {}, title), h("p", {}, h("span", { class: `mark ${v}` }), " ", v), h("p", { class: "hint", dir: "auto" }, note || "no note"));
  const write = (note) => async () => {
    box.close();
    byId("note").value = note;
    await decide(value, note);
  };
  const both = why.trim() && theirs.verdict.why && why.trim() !== theirs.verdict.why;
  const box = dialog(
    `${theirs.name} was decided elsewhere meanwhile`,
    h("div", { class: "sides" }, verdict(`There${theirs.verdict.by ? `, by ${theirs.verdict.by}` : ""}`, theirs.verdict.value, theirs.verdict.why), verdict("Here, not saved", value, why)),
    h(
      "p",
      { class: "choices" },
      h("button", { type: "button", autofocus: true, onclick: () => box.close() }, "Keep theirs"),
      h("button", { type: "button", onclick: write(why) }, "Write mine"),
      both && h("button", { type: "button", onclick: write(`${theirs.verdict.why}; ${why.trim()}`) }, "Mine, with both notes"),
    ),
  );
}

function settleExplanation(theirs, text) {
  const side = (title, words) => h("div", { class: "side-of" }, h("h3", {}, title), h("p", { dir: "auto" }, words || "nothing"));
  const box = dialog(
    `${theirs.name} was explained elsewhere meanwhile`,
    h("div", { class: "sides" }, side(`There${theirs.explained_by ? `, by ${theirs.explained_by}` : ""}`, theirs.explanation), side("Here, not saved", text)),
    h(
      "p",
      { class: "choices" },
      h("button", { type: "button", autofocus: true, onclick: () => { box.close(); leaveEditor(theirs); } }, "Keep theirs"),
      h("button", { type: "button", onclick: async () => { box.close(); (await word(theirs.name, text, theirs.versions.explanation)) && leaveEditor(null); } }, "Write mine"),
      h("button", { type: "button", onclick: () => { box.close(); leaveEditor(theirs); view.edit(`${theirs.explanation}\n${text}`, theirs.versions.explanation); } }, "Edit both"),
    ),
  );
}

function leaveEditor(theirs) {
  byId("meaning-edit")?.removeAttribute("id");
  if (theirs) adopt(theirs);
  else view.retell(view.detail);
}

async function undo(number) {
  await leaveNote();
  try {
    const { concept, undone } = await api.undo(number);
    adopt(concept);
    tellOthers(concept.name);
    const there = h("button", { type: "button", class: "plain", onclick: () => open(concept.name) }, concept.name);
    toast(`Undone: the ${undone.field} of`, there);
    return true;
  } catch (error) {
    toast(error.message);
    return false;
  }
}

async function history() {
  const changes = await api.history().catch((error) => toast(error.message));
  if (!changes) return;
  const words = (change, side) => (change.field === "verdict" ? change[side].value + (change[side].why ? `: ${change[side].why}` : "") : change[side].text || "nothing");
  const row = (change) =>
    h(
      "li",
      { class: change.standing ? "" : "gone" },
      h("a", { href: `#${change.name}`, onclick: () => byId("dialog").close() }, change.name),
      h("span", { dir: "auto" }, h("s", {}, words(change, "before")), " → ", words(change, "after")),
      h("span", { class: "hint" }, `${change.undoes ? "undone " : ""}${new Date(change.at).toLocaleString()}${change.after.by ? `, ${change.after.by}` : ""}`),
      change.standing && h("button", { type: "button", class: "plain", onclick: async () => (await undo(change.number)) && history() }, "Undo"),
    );
  dialog("History", changes.length ? h("ol", { class: "history" }, changes.map(row)) : h("p", { class: "empty" }, "Nothing was changed on this page yet."));
}

async function copy() {
  const chosen = list.all.filter((concept) => concept.verdict?.value === "undesired").map((concept) => concept.name);
  if (!chosen.length) return toast("No concept is undesired yet, so there is nothing to ablate.");
  const { line, command } = state.recipe;
  const copied = (text) => navigator.clipboard.writeText(text).then(() => true, () => false);
  const part = (title, text) => {
    const button = h("button", { type: "button", onclick: async () => (button.textContent = (await copied(text)) ? "Copied" : "Select and copy it") }, "Copy");
    return h("div", { class: "snippet" }, h("h3", {}, title), h("pre", { tabindex: "0" }, text), button);
  };
  const done = await copied(line);
  dialog(
    done ? "Copied" : "Ready to copy",
    h("p", {}, `Trains with ${plural(chosen.length, "undesired concept")} ablated: `, chosen.slice(0, 12).join(", "), chosen.length > 12 ? `, and ${count(chosen.length - 12)} more.` : "."),
    part("In a recipe", line),
    part("On the command line", command),
  );
}

const KEYS = [
  ["j k ↓ ↑", "next and previous concept", null],
  ["↵", "next undecided concept", next],
  ["1", "undesired", () => decide("undesired")],
  ["2", "keep", () => decide("keep")],
  ["3", "undecided", () => decide("undecided")],
  ["n", "note why", () => byId("note").focus()],
  ["e", "edit the explanation", () => view.detail && view.edit()],
  ["[ ]", "the other end, the next layer", null],
  ["x", "examples: ↑ ↓ from one to the next, ← → the values of their tokens", enterExamples],
  ["t", "try your own text", () => view.typed?.field.focus()],
  ["z", "undo this tab's last change", () => undo()],
  ["h", "history", history],
  ["c", "copy the recipe line", copy],
  ["/", "search", () => byId("search").focus()],
  ["l", "the list", () => byId("list").focus()],
  ["Space", "scroll the evidence", null],
  ["Esc", "leave a field, the examples, or the concept", null],
  ["?", "these keys", help],
];
const pressed = new Map(KEYS.filter(([, , does]) => does).map(([key, , does]) => [key === "↵" ? "Enter" : key, does]));
for (const [key, does] of [["j", () => list.step(1)], ["ArrowDown", () => list.step(1)], ["k", () => list.step(-1)], ["ArrowUp", () => list.step(-1)], ["PageDown", () => list.step(10)], ["PageUp", () => list.step(-10)], ["Home", () => list.step(-Infinity)], ["End", () => list.step(Infinity)], ["[", () => view.step(-1)], ["]", () => view.step(1)]])
  pressed.set(key, does);

function help() {
  dialog("Keys", h("dl", { class: "keys" }, KEYS.map(([key, what]) => [h("dt", {}, key.split(" ").map((one) => h("kbd", {}, one))), h("dd", {}, what)])));
}

function next() {
  const name = list.nextUndecided();
  if (name) open(name);
  else toast(list.undecided ? "No other undecided concept under these filters." : "Every concept is decided.");
}

const IN_LIST = new Set(["ArrowDown", "ArrowUp", "PageDown", "PageUp", "Home", "End"]);

document.addEventListener("keydown", (event) => {
  const { target, key } = event;
  if (byId("dialog").open || walk(event)) return;
  const typing = target.matches("input, textarea, select");
  if (key === "Escape") {
    if (typing) target.blur();
    else if (document.body.dataset.view === "concept") back();
    return;
  }
  if ((event.ctrlKey || event.metaKey) && key === "z" && !typing) {
    event.preventDefault();
    return undo();
  }
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  if (key === "Enter" && target.matches("button, a, summary")) return;
  // Arrows and pages scroll the evidence where it has the focus.
  if (IN_LIST.has(key) && byId("concept").contains(target)) return;
  if (target.closest("[role=radiogroup]") && key.startsWith("Arrow")) return;
  const does = pressed.get(key);
  if (!does) return;
  event.preventDefault();
  does();
});

function back() {
  leaveNote();
  document.body.dataset.view = "list";
  byId("list").focus({ preventScroll: true });
}

byId("note").addEventListener("input", () => {
  state.note ??= current()?.versions.verdict ?? null;
  byId("saved").textContent = "not saved yet";
});
byId("note").addEventListener("change", leaveNote);
byId("note").addEventListener("keydown", (event) => {
  if (event.key === "Enter") event.target.blur();
  event.stopPropagation();
  if (event.key === "Escape") {
    state.note = null;
    fillDecision(current());
    event.target.blur();
  }
});

const radios = [...document.querySelectorAll("[data-verdict]")];
radios.forEach((button, at) => {
  button.addEventListener("mousedown", (event) => event.preventDefault()); // the note keeps its words until decided
  button.addEventListener("click", () => decide(button.dataset.verdict));
  button.addEventListener("keydown", (event) => {
    const way = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!way) return;
    event.preventDefault();
    radios[(at + way + radios.length) % radios.length].focus();
  });
});
for (const [id, does] of [["next", next], ["back", back], ["copy", copy], ["history", history], ["help", help], ["undo", () => undo()]])
  byId(id).addEventListener("click", does);
byId("dialog").addEventListener("click", (event) => event.target === event.currentTarget && event.target.close());

onTold(async (name) => {
  await refresh();
  const concept = list.get(name);
  if (concept?.verdict) adopt(concept);
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) refresh().then(() => current()?.verdict && adopt(current())).catch((error) => toast(error.message));
});
addEventListener("beforeunload", (event) => {
  if (state.note !== null || byId("meaning-edit")) event.preventDefault();
});
addEventListener("hashchange", () => {
  const name = decodeURIComponent(location.hash.slice(1));
  if (name) show(name);
  else back();
});

try {
  await refresh();
  const name = decodeURIComponent(location.hash.slice(1));
  if (list.get(name)) show(name);
  else if (matchMedia("(min-width: 48rem)").matches && list.shown.length) {
    list.select(list.shown[0].name);
    window.history.replaceState(null, "", `#${list.shown[0].name}`);
    show(list.shown[0].name);
  }
} catch (error) {
  byId("concept").replaceChildren(h("p", { class: "problem", role: "alert" }, error.message));
}
