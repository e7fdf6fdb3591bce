// Show the numbers of a token when it is pointed at, tapped, or reached with the arrow keys.
"use strict";

const xrays = JSON.parse(document.getElementById("xrays").textContent);
const panel = document.getElementById("panel");
const tokens = xrays.models.map((_, m) => [...document.querySelectorAll(`[data-model="${m}"] .t`)]);
const places = new Map(); // token → [model, index]
tokens.forEach((list, m) => list.forEach((token, i) => places.set(token, [m, i])));

// Make an element. Text from the model goes in as text, never as markup.
function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function digits(value) {
  return Math.abs(value) >= 0.001 || value === 0 ? value.toFixed(3) : value.toExponential(0);
}

function row(label, value, share) {
  const line = element("tr");
  const name = element("th", label);
  name.scope = "row";
  const bar = element("span", undefined, "bar");
  bar.style.width = `${(100 * share).toFixed(1)}%`;
  const cell = element("td");
  cell.append(bar);
  line.append(name, element("td", value, "n"), cell);
  return line;
}

function list(title, rows) {
  const table = element("table");
  table.append(element("caption", title), ...rows);
  return table;
}

function describe(m, i) {
  const { name, texts, positions } = xrays.models[m];
  const [, , position, token, next, learned, nll, rank, likeliest, gradient] = positions[i];
  const part = element("div");
  if (xrays.models.length > 1) part.append(element("p", name, "soft"));
  part.append(element("h3", `${texts[token]} → ${texts[next]}`));
  const kind = learned ? "learned (weight 1)" : "given (weight 0)";
  const p = digits(Math.exp(-nll));
  part.append(element("p", `position ${position}: probability ${p}, rank ${rank}, nll ${nll.toFixed(3)} nats; ${kind}`));
  const lists = element("div", undefined, "lists");
  lists.append(list("likeliest next tokens", likeliest.map(([id, value]) => row(texts[id], digits(value), value))));
  if (gradient.length) {
    const signed = (value) => (value < 0 ? "−" : "+") + digits(Math.abs(value));
    const rows = gradient.map(([id, value]) => row(texts[id], signed(value), Math.abs(value)));
    lists.append(list("gradient at the logits: softmax − one-hot", rows));
  }
  part.append(lists);
  return part;
}

let chosen = null;
let pinned = false;

function choose(m, i) {
  document.querySelectorAll(".t.here").forEach((token) => {
    token.classList.remove("here");
    token.setAttribute("aria-selected", "false");
    token.tabIndex = -1;
  });
  chosen = [m, i];
  const shown = xrays.models.map((_, other) => other).filter((other) => other === m || xrays.linked);
  const sides = element("div", undefined, "sides");
  shown.forEach((other) => {
    const token = tokens[other][i];
    token.classList.add("here");
    token.setAttribute("aria-selected", "true");
    token.tabIndex = 0;
    sides.append(describe(other, i));
  });
  panel.replaceChildren(sides);
}

function nearestInLine(m, i, direction) {
  // Return the index of the nearest token in the line above (direction -1) or below (1).
  const all = tokens[m];
  const from = all[i].getBoundingClientRect();
  let j = i;
  while (all[j] && Math.abs(all[j].getBoundingClientRect().top - from.top) < from.height / 2) j += direction;
  if (!all[j]) return i;
  const line = all[j].getBoundingClientRect().top;
  let best = j;
  for (; all[j] && Math.abs(all[j].getBoundingClientRect().top - line) < from.height / 2; j += direction) {
    const off = (k) => Math.abs(all[k].getBoundingClientRect().left - from.left);
    if (off(j) < off(best)) best = j;
  }
  return best;
}

const main = document.querySelector("main");
main.addEventListener("mouseover", (event) => {
  const place = places.get(event.target);
  if (place && !pinned) choose(...place);
});
main.addEventListener("focusin", (event) => {
  const place = places.get(event.target);
  if (place) choose(...place);
});
main.addEventListener("click", (event) => {
  const place = places.get(event.target);
  if (!place) return;
  pinned = !(pinned && chosen && chosen[0] === place[0] && chosen[1] === place[1]);
  event.target.focus();
});
main.addEventListener("keydown", (event) => {
  const place = places.get(event.target);
  if (!place) return;
  const [m, i] = place;
  const last = tokens[m].length - 1;
  const moves = {
    ArrowRight: () => i + 1, ArrowLeft: () => i - 1, Home: () => 0, End: () => last,
    ArrowDown: () => nearestInLine(m, i, 1), ArrowUp: () => nearestInLine(m, i, -1),
  };
  if (event.key === "Escape") pinned = false;
  if (!(event.key in moves)) return;
  event.preventDefault();
  pinned = true;
  tokens[m][Math.min(last, Math.max(0, moves[event.key]()))].focus();
});
tokens.forEach((all) => { if (all[0]) all[0].tabIndex = 0; });

// The table is made when it is opened: for a long text it is larger than the rest of the page.
const all = document.getElementById("all");
all.addEventListener("toggle", () => {
  if (!all.open || all.querySelector("table")) return;
  xrays.models.forEach(({ name, texts, positions }) => {
    const wide = element("div", undefined, "wide");
    wide.tabIndex = 0;
    wide.setAttribute("role", "region");
    wide.setAttribute("aria-label", `All positions: ${name}`);
    const table = element("table");
    table.append(element("caption", name));
    const head = element("tr");
    const names = ["position", "reads", "next", "weight", "probability", "rank", "nll", "likeliest", "gradient"];
    names.forEach((title) => { const cell = element("th", title); cell.scope = "col"; head.append(cell); });
    const top = element("thead");
    top.append(head);
    const body = element("tbody");
    positions.forEach(([r, d, position, token, next, learned, nll, rank, likeliest, gradient]) => {
      const line = element("tr");
      const words = (found) => found.map(([id, value]) => `${texts[id]} ${digits(value)}`).join("  ");
      const where = `${r}.${d}.${position}`;
      [where, texts[token], texts[next], learned, digits(Math.exp(-nll)), rank, nll.toFixed(3), words(likeliest),
        words(gradient)].forEach((value) => line.append(element("td", String(value))));
      body.append(line);
    });
    table.append(top, body);
    wide.append(table);
    all.append(wide);
  });
});
