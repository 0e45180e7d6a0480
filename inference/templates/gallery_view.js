// The gallery's view menu: columns, order, and what is on show as one picture.

// --- which columns, in which order ------------------------------------------------------------------------------------

function showColumns() {
  for (const element of findAll("[data-column]")) element.hidden = !state.columns.has(Number(element.dataset.column));
  document.body.style.setProperty("--columns", state.columns.size);
  for (const row of rows) {
    place(row, row.cells.filter(onShow));
    for (const cell of row.cells) cell.figure.hidden = !onShow(cell);
  }
  draw();
}

const boxes = findAll("#columns input");
for (const box of boxes) {
  box.addEventListener("change", () => {
    state.columns = new Set(boxes.filter((one) => one.checked).map((one) => Number(one.value)));
    for (const one of boxes) one.disabled = one.checked && state.columns.size === 1; // the last one stays
    showColumns();
  });
}

// The row's score; what has none comes last, whichever way is up.
const scoreOf = (row) => row.cells[state.sort[0]].scores[state.sort[1]] ?? NaN;
const mean = (numbers) => numbers.reduce((sum, one) => sum + one, 0) / numbers.length;

// The best first: prompts by the mean of their rows, and within each the rows.
function sortRows() {
  const sign = state.sort?.[1].includes("↓") ? 1 : -1;
  const better = (a, b) => (Number.isNaN(a) || Number.isNaN(b) ? Number.isNaN(a) - Number.isNaN(b) : sign * (a - b));
  const known = (block) => rows.filter((row) => row.block === block && !Number.isNaN(scoreOf(row))).map(scoreOf);
  if (state.sort) {
    const means = new Map(blocks.map((block) => [block, mean(known(block))]));
    const earlier = (a, b) => blocks.indexOf(a.block) - blocks.indexOf(b.block);
    const ways = [(a, b) => better(means.get(a.block), means.get(b.block)), earlier, (a, b) => better(scoreOf(a), scoreOf(b))];
    rows.sort((a, b) => ways.reduce((found, way) => found || way(a, b), 0) || a.index - b.index);
  } else rows.sort((a, b) => a.index - b.index);
  for (const row of rows) {
    find("main").append(row.block);
    row.block.append(row.element);
  }
}

find("#sort")?.addEventListener("change", ({ target }) => {
  state.sort = target.value ? JSON.parse(target.value) : null;
  sortRows();
  draw();
});

// --- what is on show, as one picture ----------------------------------------------------------------------------------

const LARGEST_SIDE = 16384; // pixels, of a canvas in every browser; and of all of them together:
const LARGEST_AREA = 64e6;

// Words in lines that fit.
function wrapped(pen, text, width) {
  const lines = [""];
  for (const word of text.split(/\s+/)) {
    const longer = `${lines.at(-1)} ${word}`.trim();
    if (lines.at(-1) && pen.measureText(longer).width > width) lines.push(word);
    else lines[lines.length - 1] = longer;
  }
  return lines;
}

// Names, prompts and seeds around the pictures; the tiles are as large as the pictures, or smaller where all together
// would be more than a browser draws.
async function sheet() {
  const columns = state.mode === "compare" ? [...new Set(state.sides)] : columnsOnShow();
  const shown = visibleRows().map((row) => ({ row, cells: columns.map((column) => row.cells[column]) }));
  const pictures = shown.flatMap(({ cells }) => cells).filter((cell) => cell.picture);
  const images = new Map();
  for (const cell of pictures) {
    const image = Object.assign(new Image(), { src: cell.picture.uri });
    await image.decode();
    images.set(cell, image);
  }
  const shape = Math.max(...pictures.map(({ picture }) => picture.height / picture.width));
  const natural = Math.max(192, ...pictures.map(({ picture }) => picture.width));
  const [across, down] = [columns.length, shown.length * shape]; // in tiles; half of the limits is left to what is around
  const side = Math.min(natural, Math.sqrt(LARGEST_AREA / 2 / (across * down)), LARGEST_SIDE / 2 / Math.max(across, down));
  const [width, height, gap, line] = [Math.floor(side), Math.floor(side * shape), 8, 22];
  const canvas = document.createElement("canvas");
  const pen = canvas.getContext("2d");
  const font = (weight) => `${weight} 15px system-ui, sans-serif`;
  canvas.width = 64 + columns.length * (width + gap) + gap;
  pen.font = font("normal");
  const texts = new Map(shown.map(({ row }) => [row.block, wrapped(pen, row.prompt, canvas.width - 2 * gap)]));
  const above = [...texts.values()].reduce((sum, lines) => sum + lines.length * line + gap, 0);
  canvas.height = line + 2 * gap + above + shown.length * (height + gap);
  Object.assign(pen, { fillStyle: "#fff", textBaseline: "top", imageSmoothingQuality: "high" });
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.fillStyle = "#1a1a1a";
  pen.font = font("bold");
  const left = (place) => 64 + place * (width + gap);
  for (const [place, column] of columns.entries()) pen.fillText(data.names[column], left(place), gap, width);
  pen.font = font("normal");
  let [y, block] = [line + 2 * gap, null];
  for (const { row, cells } of shown) {
    if (row.block !== block) {
      block = row.block;
      for (const text of texts.get(block)) {
        pen.fillText(text, gap, y, canvas.width - 2 * gap);
        y += line;
      }
      y += gap;
    }
    pen.fillText(`seed ${row.seed}`, gap, y, 52);
    for (const [place, cell] of cells.entries()) {
      const image = images.get(cell);
      if (!image) continue;
      const factor = Math.min(width / image.naturalWidth, height / image.naturalHeight);
      pen.drawImage(image, left(place), y, image.naturalWidth * factor, image.naturalHeight * factor);
    }
    y += height + gap;
  }
  return canvas;
}

find("#export").addEventListener("click", async () => {
  const output = find("#exported");
  if (!visibleRows().length) {
    output.textContent = "nothing is on show";
    return;
  }
  output.textContent = "drawing …";
  const canvas = await sheet();
  const blob = await new Promise((done) => canvas.toBlob(done, "image/png"));
  const name = decodeURIComponent(location.pathname.split("/").at(-1)).replace(/\.html?$/, "");
  const download = `${name || "gallery"}-selection.png`;
  const link = Object.assign(make("a", ""), { href: URL.createObjectURL(blob), download });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // the browser reads it after the click
  output.textContent = `${download}, ${canvas.width} × ${canvas.height} pixels`;
});
