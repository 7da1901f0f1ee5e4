// A text of the person's own, read by the loaded model while it is typed.

import { api } from "./api.js";
import { fixed, h, signed } from "./dom.js";
import { marked } from "./evidence.js";

const PAUSE = 200; // milliseconds without a key before the model reads
let kept = ""; // the same text is tried on one concept after the other

export function typed(view) {
  const field = h("textarea", { id: "typed", rows: 1, dir: "auto", spellcheck: "false", placeholder: "Try your own text (t)", "aria-label": "Your own text", maxlength: 20000 });
  const shown = h("div", { class: "shown", id: "typed-shown", "aria-live": "polite" });
  const state = { answer: null, timer: null, aborted: null };
  field.value = kept;

  function redraw() {
    grow();
    if (!state.answer) return shown.replaceChildren();
    const { end } = view;
    const numbers = state.answer.projections[end.site]?.[end.direction] ?? [];
    const ends = view.endsHere();
    // Above its threshold an end is active; where there is none, from the centre on.
    const heard = numbers.filter((p) => p !== null).sort((a, b) => a - b);
    const centre = (one) => one.reading?.centre ?? heard[heard.length >> 1] ?? 0;
    const over = (one, p) => one.sign * p - (one.latent && one.twoEnded ? one.latent.threshold : one.sign * centre(one));
    const values = numbers.map((p) => {
      if (p === null) return 0;
      const found = ends.map((one) => [one.sign, over(one, p)]).sort((a, b) => b[1] - a[1])[0];
      return found && found[1] > 0 ? found[0] * found[1] : 0;
    });
    const most = Math.max(...ends.map((one) => view.scale(one)), 0) || Math.max(...values.map(Math.abs), 1e-9);
    const spoken = numbers.map((p, i) => [p, i]).filter(([p]) => p !== null);
    const top = spoken.reduce((best, here) => (best === null || end.sign * here[0] > end.sign * best[0] ? here : best), null);
    const notes = [
      top && `${end.sign > 0 ? "Highest" : "Lowest"}: ${fixed(top[0])} at “${state.answer.pieces[top[1]].trim() || "␣"}”`,
      end.latent && end.twoEnded && `active beyond ${fixed(end.sign * end.latent.threshold)}`,
      end.twoEnded ? null : "by its decoder’s direction, not its encoder",
      state.answer.cut && "only the first part was read",
    ].filter(Boolean);
    const text = marked(state.answer.pieces, values, most, (value, i) => `projection ${signed(numbers[i])}`);
    text.tabIndex = -1;
    shown.replaceChildren(text, h("p", { class: "hint" }, notes.join(" · ")));
  }

  async function read() {
    state.aborted?.abort();
    const text = field.value;
    if (!text.trim()) {
      state.answer = null;
      return redraw();
    }
    state.aborted = new AbortController();
    const waiting = setTimeout(() => shown.replaceChildren(h("p", { class: "hint" }, "The model is reading…")), 600);
    try {
      state.answer = await api.read(view.detail.name, text, state.aborted.signal);
      clearTimeout(waiting);
      redraw();
    } catch (error) {
      clearTimeout(waiting);
      if (error.name === "AbortError") return;
      state.answer = null;
      shown.replaceChildren(h("p", { class: "problem", role: "alert" }, error.message));
    }
  }

  function grow() {
    field.style.setProperty("height", "auto");
    if (field.isConnected) field.style.setProperty("height", `${field.scrollHeight + 2}px`);
  }

  function later() {
    kept = field.value;
    grow();
    clearTimeout(state.timer);
    state.timer = setTimeout(read, PAUSE);
  }

  field.addEventListener("input", later);
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") field.blur();
    event.stopPropagation();
  });
  if (view.live && kept) read();
  const element = view.live
    ? h("section", { class: "block typed" }, field, shown)
    : h("p", { class: "hint typed" }, "To try texts of your own, start with ", h("code", {}, "narrowly review … ", h("span", { class: "whole" }, "--model"), ` ${view.detail.provenance.model}`), ".");
  return {
    element,
    field,
    redraw,
    stop() {
      clearTimeout(state.timer);
      state.aborted?.abort();
    },
  };
}
