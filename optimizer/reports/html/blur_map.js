"use strict";
// The panel: which words the reference and the quantized models would have said at a token.
// Text enters the page through textContent only, so nothing in it can become markup.
const data = JSON.parse(document.getElementById("data").textContent);
const panel = document.getElementById("panel");
let chosen = -1;

function element(tag, text, name) {
  const made = document.createElement(tag);
  made.textContent = text;
  if (name) made.className = name;
  return made;
}

function percent(chance) {
  return chance >= 0.0995 ? (100 * chance).toFixed(0) + " %" : (100 * chance).toFixed(1) + " %";
}

function show(index) {
  const unit = data.units[index];
  if (!unit) return;
  for (const old of document.querySelectorAll(".on")) old.classList.remove("on");
  for (const span of document.querySelectorAll(`span[data-i="${index}"]`)) span.classList.add("on");
  chosen = index;
  const table = document.getElementById("words");
  table.replaceChildren();
  document.getElementById("token").textContent = data.words[unit.token];
  const head = table.createTHead().insertRow();
  const body = table.createTBody();
  data.models.forEach((name, m) => {
    const kl = m ? `, KL ${unit.kl[m - 1]}` : "";
    const cell = element("th", name + kl);
    cell.colSpan = 2;
    head.append(cell);
  });
  for (let k = 0; unit.top && k < unit.top[0].length; k++) {
    const row = body.insertRow();
    for (const words of unit.top) {
      const [word, chance] = words[k];
      row.append(element("td", data.words[word], word === unit.token ? "true" : ""));
      row.append(element("td", percent(chance), "n"));
    }
  }
  const row = body.insertRow();
  for (const chance of unit.true || []) {
    row.append(element("td", "the real token", "quiet"), element("td", percent(chance), "n"));
  }
  panel.hidden = false;
}

function close() {
  panel.hidden = true;
  chosen = -1;
  for (const old of document.querySelectorAll(".on")) old.classList.remove("on");
}

// The next token, in reading order, that is marked without colour too.
function step(direction) {
  const marked = data.marked;
  const here = marked.findIndex((i) => (direction > 0 ? i > chosen : i >= chosen));
  let next = direction > 0 ? here : (here < 0 ? marked.length : here) - 1;
  if (next < 0) next = direction > 0 ? 0 : marked.length - 1;
  if (marked[next] === undefined) return;
  show(marked[next]);
  const spans = [...document.querySelectorAll(`span[data-i="${marked[next]}"]`)];
  const seen = spans.find((span) => span.offsetParent !== null);
  if (seen) seen.scrollIntoView({ block: "center" });
}

document.addEventListener("click", (event) => {
  const span = event.target.closest("span[data-i]");
  if (span) show(Number(span.dataset.i));
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") close();
});
document.getElementById("close").addEventListener("click", close);
document.getElementById("next").addEventListener("click", () => step(1));
document.getElementById("previous").addEventListener("click", () => step(-1));
for (const start of document.querySelectorAll(".walk")) {
  start.hidden = !data.marked.length;
  start.addEventListener("click", () => step(1));
}
