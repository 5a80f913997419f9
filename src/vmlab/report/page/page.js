"use strict";
{
  const byId = (id) => document.getElementById(id);
  const tests = [...document.querySelectorAll("li.test")];
  const suites = [...document.querySelectorAll("section.suite")];
  const form = byId("filters");
  const search = byId("search");
  const hypervisor = byId("hypervisor");
  const outcomes = [...form.querySelectorAll("input[name=outcome]")];
  // What a test says, in lower case: made when it is first searched for.
  const texts = new Map();
  const textOf = (test) => {
    if (!texts.has(test)) {
      const suite = test.closest("section.suite").getAttribute("aria-label");
      texts.set(test, `${suite} ${test.textContent}`.toLowerCase());
    }
    return texts.get(test);
  };

  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = new Set(outcomes.filter((box) => box.checked).map((box) => box.value));
    const on = hypervisor ? hypervisor.value : "";
    let shown = 0;
    for (const test of tests) {
      const fits = wanted.has(test.dataset.outcome)
        && (on === "" || test.dataset.hypervisor === on)
        && words.every((word) => textOf(test).includes(word));
      test.hidden = !fits;
      shown += fits;
    }
    for (const suite of suites) {
      suite.hidden = suite.querySelector("li.test:not([hidden])") === null;
    }
    byId("shown").textContent = shown === tests.length
      ? `${tests.length} tests`
      : `${shown} of ${tests.length} tests shown`;
  };

  // A link to something inside a closed test opens it.
  const reveal = () => {
    const target = location.hash.length > 1 ? byId(decodeURIComponent(location.hash.slice(1))) : null;
    if (target === null) return;
    const inside = target.matches("li.test") ? target.querySelector("details") : target;
    for (let each = inside; each !== null; each = each.parentElement) {
      if (each instanceof HTMLDetailsElement) each.open = true;
    }
    target.scrollIntoView({ block: "center" });
    if (target.tabIndex === -1 && target.hasAttribute("tabindex")) {
      target.focus({ preventScroll: true });
    }
  };

  const openShown = (open) => {
    for (const test of tests) {
      if (!open || !test.hidden) test.querySelector("details").open = open;
    }
  };

  form.hidden = false;
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", filter);
  byId("open-all").addEventListener("click", () => openShown(true));
  byId("close-all").addEventListener("click", () => openShown(false));
  addEventListener("hashchange", reveal);

  const copy = byId("copy");
  if (copy !== null) {
    copy.hidden = false;
    copy.addEventListener("click", async () => {
      getSelection().selectAllChildren(byId("command"));
      let said = "Copied.";
      try {
        await navigator.clipboard.writeText(byId("command").textContent);
      } catch {
        said = "Selected; copy it with the keyboard.";
      }
      byId("copied").textContent = said;
    });
  }

  const first = (...outcomes) => tests.find((test) => outcomes.includes(test.dataset.outcome));
  const wrong = first("error", "fail") ?? first("pending");
  if (location.hash.length > 1) reveal();
  else if (wrong) wrong.querySelector("details").open = true;
  filter(); // a browser may have kept what was typed before the page was loaded again
}
