"use strict";
// Hovering names a plan; clicking shows its bits in the heat map. Without this the page is whole.
(() => {
  const { points = [], columns = [] } = JSON.parse(document.getElementById("data").textContent);
  const STEPS = [1, 2, 3, 4, 5, 6, 7, 8, 16], FIRST = 48, REACH = 40;
  const tip = document.getElementById("tip"), shown = document.getElementById("shown");
  document.documentElement.classList.add("js");

  const cellOf = (cell, letters) => {
    const found = cell.dataset.g.split(",").map((g) => columns[letters.charCodeAt(+g) - FIRST]);
    const bits = Math.round(found.reduce((sum, c) => sum + c[0], 0) / found.length);
    cell.className = "h" + STEPS.slice(0, -1).filter((step) => bits > step).length;
    cell.textContent = found.every((c) => c[1]) ? "t" : bits;
    cell.title = cell.title.replace(/: [^:]*$/, "") + ": " + [...new Set(found.map((c) => c[2]))].join(", ");
  };
  const show = (index) => {
    const point = points[index];
    document.querySelectorAll(".picked").forEach((mark) => mark.classList.remove("picked"));
    document.querySelectorAll(`[data-i="${index}"]`).forEach((mark) => mark.classList.add("picked"));
    shown.textContent = "Shown: " + point.text + ".";
    document.querySelectorAll("td[data-g]").forEach((cell) => cellOf(cell, point.layers));
  };
  const nearest = (chart, event) => {
    const box = chart.getBoundingClientRect(), scale = box.width / chart.viewBox.baseVal.width;
    let best = null, least = REACH;
    for (const mark of chart.querySelectorAll("[data-i]")) {
      const far = Math.hypot(mark.dataset.x * scale + box.left - event.clientX,
        mark.dataset.y * scale + box.top - event.clientY);
      // marks on top of each other: the later one was drawn above
      if (far <= least) [best, least] = [+mark.dataset.i, far];
    }
    return best;
  };
  for (const chart of document.querySelectorAll("svg.chart")) {
    chart.addEventListener("pointermove", (event) => {
      const index = nearest(chart, event);
      tip.hidden = index === null;
      if (index === null) return;
      tip.textContent = points[index].text;
      tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
      tip.style.top = Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8) + "px";
    });
    chart.addEventListener("pointerleave", () => { tip.hidden = true; });
    chart.addEventListener("click", (event) => {
      const index = nearest(chart, event);
      if (index !== null) show(index);
    });
  }
  document.querySelectorAll("button[data-show]").forEach((button) =>
    button.addEventListener("click", () => {
      show(+button.dataset.show);
      shown.scrollIntoView({ block: "center" });
    }));
})();
