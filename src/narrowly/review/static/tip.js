// The number behind a token or a mark: on hover, on touch, and by keyboard from token to token.

import { byId } from "./dom.js";

const EXAMPLES = "#typed-shown .text, #evidence .window, #evidence .more";
const tip = byId("tip");
let token = null; // where the arrow keys are

function show(element) {
  tip.textContent = element.dataset.tip;
  tip.hidden = false;
  const box = element.getClientRects()[0] ?? element.getBoundingClientRect();
  const left = Math.min(Math.max(box.left + box.width / 2 - tip.offsetWidth / 2, 4), innerWidth - tip.offsetWidth - 4);
  tip.style.setProperty("left", `${left}px`);
  tip.style.setProperty("top", `${box.top > 40 ? box.top - tip.offsetHeight - 6 : box.bottom + 6}px`);
}

function leave() {
  token?.classList.remove("here");
  token = null;
  tip.hidden = true;
  byId("spoken").textContent = "";
}

// The windows of text, from the one that was looked at last or the first.
export function enterExamples() {
  const last = document.querySelector(".window.visited");
  (last ?? document.querySelector(EXAMPLES))?.focus();
}

// Whether a key was one of a window's: up and down to other windows, left and right over tokens.
export function walk(event) {
  const here = event.target.closest(EXAMPLES);
  if (!here) return false;
  const down = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  const right = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (down) {
    const all = [...document.querySelectorAll(EXAMPLES)];
    all[all.indexOf(here) + down]?.focus();
  } else if (right) step(here, right);
  else if (event.key === "Escape") byId("concept").focus({ preventScroll: true });
  else return false;
  event.preventDefault();
  return true;
}

function step(here, right) {
  const marks = [...here.querySelectorAll("mark")];
  if (!marks.length) return;
  const forward = getComputedStyle(marks[0].parentElement).direction === "rtl" ? -right : right;
  const before = marks.indexOf(token);
  const at = before < 0 ? (forward > 0 ? 0 : marks.length - 1) : before + forward;
  if (!marks[at]) return;
  leave();
  token = marks[at];
  token.classList.add("here");
  token.scrollIntoView({ block: "nearest" });
  show(token);
  byId("spoken").textContent = `${token.textContent}: ${token.dataset.tip}`;
}

for (const kind of ["pointerover", "pointerdown"])
  document.addEventListener(kind, (event) => {
    const over = event.target.closest?.("[data-tip]");
    if (over) show(over);
    else if (!token || kind === "pointerdown") leave(); // what scrolls under a resting pointer hides nothing
  });
document.addEventListener("focusin", (event) => {
  leave();
  if (event.target.matches("[data-tip]:focus-visible")) show(event.target);
  if (!event.target.matches(".window")) return;
  document.querySelector(".window.visited")?.classList.remove("visited");
  event.target.classList.add("visited");
});
document.addEventListener("scroll", () => (token?.isConnected ? show(token) : (tip.hidden = true)), { capture: true, passive: true });
