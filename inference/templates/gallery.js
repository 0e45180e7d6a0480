const title = document.title;
const NO_DIFFERENCE = "no difference";
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

// `order` is how a row's cells stand on the page; `vote` is a cell, NO_DIFFERENCE or null; `split` a divider's percent.
const rows = findAll(".row").map((element, index) => {
  const { prompt, seed, cells } = data.rows[index];
  const figures = findAll(".cell", element);
  const block = element.closest(".block");
  const row = { element, index, prompt, seed, block, vote: null, split: 50, pair: null };
  row.cells = cells.map((pictures, column) => {
    const figure = figures[column];
    const image = find("img", figure);
    const picture = pictures.find((one) => one.uri === null); // the picture that is there already
    if (picture) picture.uri = image.getAttribute("src");
    const [button, best] = [find(".picture", figure), find(".best", figure)];
    return { column, pictures, picture, figure, image, button, best, scores: data.rows[index].scores[column] };
  });
  row.order = [...row.cells];
  return row;
});
const blocks = findAll(".block");
const rowOf = (element) => rows.find((row) => row.element.contains(element));
const visibleRows = () => rows.filter((row) => !row.block.hidden);

const state = {
  mode: "grid", // or compare, blind, revealed
  step: data.steps.at(-1),
  scale: data.scales.toSorted((a, b) => Math.abs(a - 1) - Math.abs(b - 1))[0],
  sides: [0, data.names.length - 1], // the columns A and B of compare mode
  columns: new Set(data.names.keys()), // those on show
  sort: null, // or [column, label]: the score that the rows are sorted by
};
const onShow = (cell) => state.columns.has(cell.column);
const columnsOnShow = () => [...data.names.keys()].filter((column) => state.columns.has(column));
const voting = () => state.mode === "blind" || state.mode === "revealed";

// --- which picture a cell shows ---------------------------------------------------------------------------------------

// A picture without a step or scale (the base, an adapter of unknown training) goes with any.
const distance = (value, wanted) => (value === null ? 0 : Math.abs(value - wanted));

function nearest(pictures) {
  const far = (picture) => [distance(picture.step, state.step), distance(picture.scale, state.scale)];
  return pictures.reduce((best, picture) => {
    const [step, scale] = far(picture);
    const [bestStep, bestScale] = far(best);
    return step < bestStep || (step === bestStep && scale < bestScale) ? picture : best;
  });
}

const round = (number) => String(+number.toFixed(3));
const scaleText = ({ scale }) => (scale === null ? null : `scale ${round(scale)}`);
const stepText = ({ step }) => (step === null ? null : `step ${step}`);

function nameOf(row, cell) {
  return state.mode === "blind" ? String.fromCharCode(65 + row.order.indexOf(cell)) : data.names[cell.column];
}

const altOf = (row, cell) => `${nameOf(row, cell)}, seed ${row.seed}: ${row.prompt}`;

function caption(row, cell) {
  const shown = state.mode === "blind" ? [] : [scaleText(cell.picture), stepText(cell.picture)];
  const scores = state.mode === "blind" ? [] : Object.entries(cell.scores).map(([label, score]) => `${label} ${round(score)}`);
  return [nameOf(row, cell), row.prompt, `seed ${row.seed}`, ...shown, ...scores].filter((text) => text !== null).join(" · ");
}

// --- drawing ----------------------------------------------------------------------------------------------------------

function drawCell(row, cell) {
  find(".name", cell.figure).textContent = nameOf(row, cell);
  if (!cell.image) return;
  const picture = nearest(cell.pictures);
  if (picture !== cell.picture) Object.assign(cell.image, { src: picture.uri, width: picture.width, height: picture.height });
  cell.picture = picture;
  cell.image.alt = altOf(row, cell);
  // Where a column lacks the step or scale that was asked for, it says which it shows; voters would learn from it.
  const others = [
    distance(picture.scale, state.scale) > 0 ? scaleText(picture) : null,
    distance(picture.step, state.step) > 0 ? stepText(picture) : null,
  ];
  const [, label] = state.sort ?? [];
  if (label in cell.scores) others.push(`${label} ${round(cell.scores[label])}`);
  find(".note", cell.figure).textContent = voting() ? "" : others.filter((text) => text !== null).join(", ");
  cell.best.textContent = state.mode === "blind" ? `${nameOf(row, cell)} is best` : "voted best";
  cell.best.setAttribute("aria-pressed", row.vote === cell);
  cell.best.disabled = state.mode === "revealed";
}

function drawPair(row) {
  row.pair?.remove();
  row.pair = state.mode === "compare" ? makePair(row) : null;
  if (row.pair) row.element.append(row.pair);
}

function draw() {
  for (const row of rows) {
    for (const cell of row.cells) drawCell(row, cell);
    const same = find(".same", row.element);
    same.setAttribute("aria-pressed", row.vote === NO_DIFFERENCE);
    same.disabled = state.mode === "revealed";
    drawPair(row);
  }
  for (const row of rows) row.element.classList.toggle("votable", votable().includes(row));
  const voted = rows.filter((row) => row.vote).length;
  if (voting()) find("#voted").textContent = `voted ${voted} of ${votable().length} rows`;
  rove();
}

function place(row, order) {
  row.order = order;
  find("h3", row.element).after(...order.map((cell) => cell.figure));
}

function setMode(mode) {
  const focused = rowOf(document.activeElement);
  state.mode = document.body.dataset.mode = mode;
  document.title = mode === "blind" ? "Blind comparison" : title;
  find("#tally").hidden = mode !== "revealed";
  for (const row of rows) {
    if (mode === "revealed") break;
    row.vote = null;
    place(row, mode === "blind" ? shuffled(row.cells.filter(onShow)) : row.cells.filter(onShow));
  }
  find("#compare")?.setAttribute("aria-pressed", mode === "compare");
  find("#blind")?.setAttribute("aria-pressed", voting());
  if (find("#compare")) find("#compare").disabled = voting();
  draw();
  if (focused) stops(focused).find(Boolean)?.focus(); // the element that had it is gone or elsewhere
}

// --- compare ----------------------------------------------------------------------------------------------------------

// A over B, cut at the divider. Made anew for each drawing: what has to last is in `row.split`.
function makePair(row) {
  const pair = find("#pair").content.firstElementChild.cloneNode(true);
  const [a, b] = state.sides.map((column) => row.cells[column]);
  find(".a", pair).textContent = `A ${nameOf(row, a)}`;
  find(".b", pair).textContent = `B ${nameOf(row, b)}`;
  if (!a.picture || !b.picture) {
    find(".split", pair).replaceWith(Object.assign(make("p", "no picture of both"), { className: "missing" }));
    for (const control of [find("input", pair), find(".enlarge", pair)]) control.remove();
    return pair;
  }
  for (const [image, cell] of [[find(".over", pair), a], [find(".under", pair), b]]) {
    image.src = cell.picture.uri;
    image.alt = altOf(row, cell);
  }
  const slider = find("input", pair);
  const split = find(".split", pair);
  const move = (percent) => {
    slider.value = percent;
    row.split = slider.value; // as the slider limits and rounds it
    pair.style.setProperty("--split", `${row.split}%`);
  };
  const drag = (event) => {
    const box = split.getBoundingClientRect();
    move((100 * (event.clientX - box.left)) / box.width);
  };
  slider.ariaLabel = `Divider between ${nameOf(row, a)} and ${nameOf(row, b)}, seed ${row.seed}: ${row.prompt}`;
  slider.addEventListener("input", () => move(slider.value));
  split.addEventListener("pointerdown", (event) => {
    event.preventDefault(); // no dragging of the image itself
    split.setPointerCapture(event.pointerId);
    drag(event);
  });
  split.addEventListener("pointermove", (event) => split.hasPointerCapture(event.pointerId) && drag(event));
  find(".enlarge", pair).addEventListener("click", () => openZoom({ row, place: 0 }));
  move(row.split);
  return pair;
}

function setCompare(on) {
  if (find("#compare") && !voting()) setMode(on ? "compare" : "grid");
}

for (const [index, id] of ["#side-a", "#side-b"].entries()) {
  const select = find(id);
  if (!select) break; // a single column
  select.value = state.sides[index];
  select.addEventListener("change", () => {
    state.sides[index] = Number(select.value);
    draw();
  });
}
find("#compare")?.addEventListener("click", () => setCompare(state.mode !== "compare"));

// --- from picture to picture ------------------------------------------------------------------------------------------

// What the arrow keys stop at in a row, place by place; null where there is no picture.
function stops(row) {
  return state.mode === "compare" ? [find("input", row.pair)] : row.order.map((cell) => cell.button);
}

function neighbour({ row, place }, [across, down]) {
  const visible = visibleRows();
  let index = visible.indexOf(row);
  for (;;) {
    index += down;
    place += across;
    const stop = visible[index] && stops(visible[index])[place];
    if (stop === undefined) return null; // the edge
    if (stop) return { row: visible[index], place, stop };
  }
}

// One picture of the grid is in the tab order, the one last visited; arrow keys reach the others.
function rove(chosen) {
  const all = visibleRows().flatMap(stops).filter(Boolean);
  const current = chosen ?? all.find((stop) => stop.tabIndex === 0) ?? all[0];
  for (const stop of all) stop.tabIndex = stop === current ? 0 : -1;
}

function placeOf(stop) {
  const row = rowOf(stop);
  return { row, place: stops(row).indexOf(stop) };
}

const STOPS = ".picture, .row .pair input";
find("main").addEventListener("focusin", ({ target }) => target.matches(STOPS) && rove(target));
find("main").addEventListener("click", ({ target }) => {
  const button = target.closest(".picture");
  if (button) openZoom(placeOf(button));
});
find("main").addEventListener("keydown", (event) => {
  if (!event.target.matches(STOPS) || modified(event)) return;
  const slider = event.target.matches("input");
  const direction = ARROWS[event.key];
  if (slider && event.key === "Enter") openZoom(placeOf(event.target));
  if (!direction || (slider && direction[0])) return; // left and right are the slider's own
  event.preventDefault();
  neighbour(placeOf(event.target), direction)?.stop.focus();
});

// --- zoom -------------------------------------------------------------------------------------------------------------

const zoom = find("#zoom");
let zoomed = null; // the row and place that the dialog shows; null for a training picture

function enlarged({ uri, width, height }, alt) {
  const copy = Object.assign(new Image(), { src: uri, alt });
  const fits = Math.min((0.94 * innerWidth) / width, (0.78 * innerHeight) / height);
  const larger = Math.max(1, 768 / Math.max(width, height)); // small pictures grow, large ones are never more than exact
  copy.width = Math.round(width * Math.min(fits, larger));
  return copy;
}

function fillZoom(content, text) {
  find(".stage", zoom).replaceChildren(content);
  find(".caption", zoom).textContent = text;
  const focused = document.activeElement;
  for (const button of findAll(".steps button", zoom)) {
    button.hidden = !zoomed || (state.mode === "compare" && ARROWS[button.value][0] !== 0);
    button.disabled = button.hidden || !neighbour(zoomed, ARROWS[button.value]);
  }
  const { command } = (zoomed && state.mode === "grid" && zoomed.row.order[zoomed.place].picture) || { command: null };
  find("#command").textContent = command;
  find("#command").hidden = true;
  find("#command-copied").textContent = "";
  find("#copy-command").hidden = command === null;
  if (focused.disabled) find("form > button", zoom).focus(); // at an edge; keys would go nowhere
}

function openZoom(at) {
  zoomed = at;
  const { row, place } = at;
  if (state.mode === "compare") fillZoom(makePair(row), `${row.prompt} · seed ${row.seed}`);
  else fillZoom(enlarged(row.order[place].picture, altOf(row, row.order[place])), caption(row, row.order[place]));
  if (!zoom.open) zoom.showModal();
  if (state.mode === "compare") find("input", zoom).focus();
}

function walkZoom(direction) {
  const next = zoomed && neighbour(zoomed, direction);
  if (next) openZoom(next);
}

for (const button of findAll(".instance")) {
  button.addEventListener("click", () => {
    zoomed = null;
    const image = find("img", button);
    const [width, height] = ["width", "height"].map((side) => Number(image.getAttribute(side)));
    fillZoom(enlarged({ uri: image.src, width, height }, image.alt), image.alt);
    zoom.showModal();
  });
}
for (const button of findAll(".steps button", zoom)) {
  button.addEventListener("click", () => walkZoom(ARROWS[button.value]));
}
find("#copy-command").addEventListener("click", () => {
  copyText(find("#command").textContent, find("#command-copied"), find("#command"));
});
zoom.addEventListener("keydown", (event) => {
  const direction = ARROWS[event.key];
  if (!direction || modified(event) || (event.target.matches("input") && direction[0])) return;
  event.preventDefault();
  walkZoom(direction);
});
zoom.addEventListener("close", () => {
  find(".stage", zoom).replaceChildren();
  find(".caption", zoom).textContent = "";
  if (!zoomed) return; // the browser gives the focus back to the training picture
  if (state.mode === "compare") drawPair(zoomed.row); // the divider may have moved
  stops(zoomed.row)[zoomed.place].focus(); // not where the walk began, but where it ended
});
for (const dialog of findAll("dialog")) {
  dialog.addEventListener("click", ({ target }) => target === dialog && dialog.close()); // the backdrop
}

// --- blind ------------------------------------------------------------------------------------------------------------

function shuffled(items) {
  const result = [...items];
  for (let last = result.length - 1; last > 0; last--) {
    const other = Math.floor(Math.random() * (last + 1));
    [result[last], result[other]] = [result[other], result[last]];
  }
  return result;
}

// A single picture is no choice.
const votable = () => rows.filter((row) => row.cells.filter((cell) => cell.image && onShow(cell)).length > 1);

function vote(row, choice) {
  row.vote = row.vote === choice ? null : choice; // a second press takes it back
  draw();
}

for (const row of rows) {
  for (const cell of row.cells) cell.best?.addEventListener("click", () => vote(row, cell));
  find(".same", row.element).addEventListener("click", () => vote(row, NO_DIFFERENCE));
}

// Wilson's score interval of `count` out of `total`, 95 %.
function wilson(count, total) {
  const z = 1.959964;
  const share = count / total;
  const centre = share + (z * z) / (2 * total);
  const half = z * Math.sqrt((share * (1 - share)) / total + (z * z) / (4 * total * total));
  const scale = 1 + (z * z) / total;
  return [Math.max(0, (centre - half) / scale), Math.min(1, (centre + half) / scale)];
}

function tally() {
  const voted = rows.filter((row) => row.vote);
  const line = (name, count, total) => ({ name, votes: count, of: total, interval: total ? wilson(count, total) : null });
  const columns = columnsOnShow().map((column) => {
    const name = data.names[column];
    const chances = voted.filter((row) => row.cells[column].image);
    return line(name, chances.filter((row) => row.vote === row.cells[column]).length, chances.length);
  });
  return [...columns, line(NO_DIFFERENCE, voted.filter((row) => row.vote === NO_DIFFERENCE).length, voted.length)];
}

function reveal() {
  const lines = tally();
  setMode("revealed");
  const percent = (part) => `${Math.round(100 * part)} %`;
  find("#tally tbody").replaceChildren(
    ...lines.map(({ name, votes, of, interval }) => {
      const line = make("tr", "");
      const cells = [`${votes} of ${of}`, of ? percent(votes / of) : "–", interval?.map(percent).join(" – ") ?? "–"];
      line.append(Object.assign(make("th", name), { scope: "row" }), ...cells.map((text) => make("td", text)));
      return line;
    }),
  );
  const votes = rows.filter((row) => row.vote).map((row) => ({
    prompt: row.prompt,
    seed: row.seed,
    shown: row.order.filter((cell) => cell.image).map((cell) => data.names[cell.column]),
    best: row.vote === NO_DIFFERENCE ? null : data.names[row.vote.column],
  }));
  const asked = { step: state.step ?? null, scale: state.scale ?? null };
  find("#tally textarea").value = JSON.stringify({ title, ...asked, votes, tally: lines }, null, 2);
  find("#copied").textContent = "";
  find("#tally").focus();
  scrollTo(0, 0);
}

// Votes are never thrown away unseen: who leaves with some gets them counted first.
function toggleBlind() {
  if (!find("#blind")) return;
  if (state.mode === "blind" && rows.some((row) => row.vote)) reveal();
  else setMode(voting() ? "grid" : "blind");
}

find("#blind")?.addEventListener("click", toggleBlind);
find("#reveal")?.addEventListener("click", reveal);
find("#copy").addEventListener("click", () => {
  copyText(find("#tally textarea").value, find("#copied"), find("#tally textarea"));
});

// --- filter, step, scale ----------------------------------------------------------------------------------------------

const filter = find("#filter");

function applyFilter() {
  const wanted = filter.value.trim().toLowerCase();
  for (const block of blocks) block.hidden = !find("h2", block).textContent.toLowerCase().includes(wanted);
  const left = blocks.filter((block) => !block.hidden).length;
  find("#count").textContent = `${left} of ${blocks.length} prompts`;
  find("#nothing").hidden = left > 0;
  rove();
}
filter.addEventListener("input", applyFilter);

for (const [key, values, format] of [["step", data.steps, String], ["scale", data.scales, round]]) {
  const slider = find(`#${key}`);
  if (!slider) continue;
  const choose = () => {
    state[key] = values[slider.value];
    find(`output[for=${key}]`).textContent = format(state[key]);
    slider.setAttribute("aria-valuetext", format(state[key]));
  };
  slider.value = values.indexOf(state[key]);
  choose();
  slider.addEventListener("input", () => {
    choose();
    draw();
  });
}

// --- keys -------------------------------------------------------------------------------------------------------------

const KEYS = {
  "/": () => filter.focus(),
  b: toggleBlind,
  c: () => setCompare(state.mode !== "compare"),
  "?": () => find("#keys").showModal(),
};
find("#help").addEventListener("click", KEYS["?"]);
document.addEventListener("keydown", (event) => {
  if (modified(event) || find("dialog[open]")) return;
  if (event.target.matches("input[type=search], textarea, select") || !Object.hasOwn(KEYS, event.key)) return;
  event.preventDefault();
  KEYS[event.key]();
});

// --- start ------------------------------------------------------------------------------------------------------------

if (matchMedia("(width < 40rem)").matches) {
  for (const details of findAll(".instances, .figures")) details.open = false;
}
applyFilter();
draw();
find(".bar").hidden = false;
