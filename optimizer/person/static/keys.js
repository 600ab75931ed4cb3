"use strict";
// Keys press the buttons that name them, and no answer is sent twice. Without this script the page
// works by its buttons.
(() => {
  const form = document.querySelector("form[data-keys]");
  if (!form) return;
  const SETTLE = 250; // ms in which a key still belongs to the question before
  const shown = performance.now();
  const box = document.getElementById("keys");
  const label = document.getElementById("keys-label");
  if (box && label) {
    label.hidden = false;
    try {
      box.checked = localStorage.getItem("keys") !== "off";
      box.addEventListener("change", () => localStorage.setItem("keys", box.checked ? "on" : "off"));
    } catch { /* storage may be forbidden; then the choice holds for this page */ }
  }
  const buttonOf = (event) => {
    for (const button of form.querySelectorAll("button[data-key]")) {
      const key = button.dataset.key;
      if (event.key.toLowerCase() === key || event.code === `Key${key.toUpperCase()}`) return button;
    }
    return null;
  };
  addEventListener("keydown", (event) => {
    if (event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
    if (performance.now() - shown < SETTLE || (box && !box.checked)) return;
    if (event.target.closest("textarea, select, input:not([type=checkbox])")) return;
    const button = buttonOf(event);
    if (!button) return;
    event.preventDefault();
    button.click();
  });
  form.addEventListener("submit", (event) => {
    if (form.dataset.sent) event.preventDefault();
    form.dataset.sent = "yes";
  });
  addEventListener("pageshow", () => { delete form.dataset.sent; });
})();
