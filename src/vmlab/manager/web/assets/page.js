"use strict";
// What the page needs beside htmx: whether it is live, and a focus that is not lost.
{
  const connection = document.getElementById("connection");
  const say = (text) => { if (connection.textContent !== text) connection.textContent = text; };
  document.addEventListener("htmx:sse:after:connection", () => say("live"));
  for (const event of ["htmx:sse:error", "htmx:sse:close"]) {
    document.addEventListener(event, () => say("not live: the manager does not answer"));
  }

  // A change that could not be sent is told where the others are.
  document.addEventListener("htmx:error", (event) => {
    const source = event.detail?.ctx?.sourceElement;
    if (source?.tagName !== "FORM" || source.method !== "post") return;
    const said = document.createElement("div");
    said.className = "said problem";
    said.setAttribute("role", "alert");
    said.textContent = "The manager did not answer; nobody knows whether it was asked.";
    document.getElementById("said").replaceChildren(said);
  });

  // The button that had the focus may be gone when the page is brought up to date: then what it
  // was in has it, so that a keyboard and a screen reader stay where they were.
  let keeper = null;
  document.addEventListener("htmx:before:swap", () => {
    keeper = document.activeElement?.closest("[data-keep-focus]")?.id ?? null;
  });
  document.addEventListener("htmx:after:swap", () => {
    if (keeper !== null && (document.activeElement ?? document.body) === document.body) {
      document.getElementById(keeper)?.focus({ preventScroll: true });
    }
    keeper = null;
  });
}
