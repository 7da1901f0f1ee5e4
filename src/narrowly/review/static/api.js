// Requests to the server, and word to the other tabs of this browser.

// A tab is known through reloads, so that it can undo its own work.
const tab = sessionStorage.getItem("narrowly-tab") ?? crypto.getRandomValues(new Uint32Array(2)).join("-");
sessionStorage.setItem("narrowly-tab", tab);

export class Conflict extends Error {
  constructor(answer) {
    super(answer.error);
    this.concept = answer.concept;
  }
}

async function request(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is `narrowly review` still running? What you see is saved.");
  }
  if (response.status === 401) throw new Error("This session has ended. Open the address that `narrowly review` printed last.");
  if (response.ok) return response.json();
  const answer = await response.json().catch(() => ({}));
  if (response.status === 409) throw new Conflict(answer);
  throw new Error(answer.error ?? `The server failed (${response.status}).`);
}

const post = (path, body, signal) =>
  request(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });

const url = (name, ...rest) => ["/api/concepts", encodeURIComponent(name), ...rest].join("/");

export const api = {
  concepts: () => request("/api/concepts"),
  concept: (name, signal) => request(url(name), { signal }),
  latent: (name, index, signal) => request(url(name, "latents", index), { signal }),
  decide: (name, value, why, version) => post(url(name, "verdict"), { value, why, version, tab }),
  word: (name, text, version) => post(url(name, "explanation"), { text, version, tab }),
  read: (name, text, signal) => post(url(name, "read"), { text }, signal),
  history: () => request("/api/history"),
  undo: (number) => post("/api/undo", number === undefined ? { tab } : { number, tab }),
};

const channel = "BroadcastChannel" in window ? new BroadcastChannel("narrowly-review") : null;

export const tellOthers = (name) => channel?.postMessage(name);
export const onTold = (heard) => channel?.addEventListener("message", (event) => heard(event.data));
