// Elements are built from parts; text only ever becomes text nodes.

export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "vars")
      for (const [key, number] of Object.entries(value)) element.style.setProperty(key, number);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export const byId = (id) => document.getElementById(id);

// Line breaks, and characters that show nothing but could change how the rest reads.
const HIDDEN = {
  "\n": "⏎", "\r": "␍", "\t": "⇥", "\u200b": "ZWSP", "\u200e": "LRM", "\u200f": "RLM",
  "\u202a": "LRE", "\u202b": "RLE", "\u202c": "PDF", "\u202d": "LRO", "\u202e": "RLO",
  "\u2066": "LRI", "\u2067": "RLI", "\u2068": "FSI", "\u2069": "PDI", "\ufeff": "BOM", "\u00ad": "SHY",
};
const PATTERN = /[\n\r\t\u0000-\u001f\u007f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]/;

// Text as nodes, what is hidden in it made visible; `lines` leaves line breaks as they are.
export function visible(text, lines = false) {
  if (!PATTERN.test(text)) return [text];
  const nodes = [];
  let run = "";
  for (const character of text) {
    if (!PATTERN.test(character) || (lines && character === "\n")) {
      run += character;
      continue;
    }
    if (run) nodes.push(run);
    run = "";
    const code = character.codePointAt(0).toString(16).padStart(4, "0").toUpperCase();
    nodes.push(h("span", { class: "hidden-character", title: `U+${code}` }, HIDDEN[character] ?? `U+${code}`));
  }
  if (run) nodes.push(run);
  return nodes;
}

// Numbers as a person reads them: a true minus, no needless digits.
export function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  const text =
    size === 0 ? "0" : size >= 1000 ? Math.round(value).toLocaleString("en") : size < 0.001 ? value.toExponential(1) : String(+value.toPrecision(digits));
  return text.replace("-", "−");
}

export const fixed = (value, digits = 2) =>
  value === null || value === undefined ? "–" : value.toFixed(digits).replace(/^-(0\.?0*)$/, "$1").replace("-", "−");
export const signed = (value, digits = 2) => (value > 0 ? "+" : "") + fixed(value, digits);
export const count = (value) => value.toLocaleString("en");
export const plural = (value, noun) => `${count(value)} ${noun}${value === 1 ? "" : "s"}`;
export const percent = (share) =>
  share > 0 && share < 0.001 ? "<0.1 %" : `${share < 0.0995 ? (100 * share).toFixed(1) : Math.round(100 * share)} %`;

// "layer:12" as "layer 12"; other sites as they are.
export const place = (site) => site.replace(/^layer:(-?\d+)$/, "layer $1");

export function places(sites) {
  const layers = sites.map((site) => /^layer:(\d+)$/.exec(site)?.[1]);
  if (sites.length === 1 || layers.includes(undefined)) return sites.map(place).join(", ");
  const numbers = layers.map(Number).sort((a, b) => a - b);
  const [first, last] = [numbers[0], numbers.at(-1)];
  return last - first === numbers.length - 1 ? `layers ${first}–${last}` : `layers ${numbers.join(", ")}`;
}

const said = byId("toast");

export function toast(message, action) {
  const box = byId("dialog");
  (box.open ? box : document.body).append(said); // what lies behind an open dialog is dim, and not read out
  said.replaceChildren(message, ...(action ? [" ", action] : []));
  said.hidden = false;
  clearTimeout(toast.timer);
  toast.timer = setTimeout(() => (said.hidden = true), 4000);
}

export function dialog(title, ...content) {
  const element = byId("dialog");
  const close = h("button", { type: "button", class: "close", "aria-label": "Close", onclick: () => element.close() }, "✕");
  element.setAttribute("aria-label", title);
  element.replaceChildren(h("h2", { tabindex: "-1", autofocus: true }, title), close, ...content, ...(element.contains(said) ? [said] : []));
  if (!element.open) element.showModal();
  return element;
}
