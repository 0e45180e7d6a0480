// What a run's page does.

// --- samples ----------------------------------------------------------------------------------------------------------

const figures = findAll(".sample");
for (const [place, ladder] of data.pictures.entries()) {
  const there = ladder.find((one) => one.uri === null); // the picture that is there already
  there.uri = find("img", figures[place]).getAttribute("src");
}

// Of each the newest picture that is not newer than the step; the first one where all are.
function showStep(step) {
  for (const [place, ladder] of data.pictures.entries()) {
    const picture = ladder.findLast((one) => one.step <= step) ?? ladder[0];
    const image = find("img", figures[place]);
    if (image.src !== picture.uri) Object.assign(image, { src: picture.uri, width: picture.width, height: picture.height });
    find("figcaption span", figures[place]).textContent = `step ${picture.step}`;
  }
}

const slider = find("#step");
slider?.addEventListener("input", () => {
  const step = data.steps[slider.value];
  find("output[for=step]").textContent = step;
  slider.setAttribute("aria-valuetext", step);
  showStep(step);
  point(step);
});

// --- curves -----------------------------------------------------------------------------------------------------------

const charts = findAll(".chart").map((element, place) => ({ element, ...data.charts[place] }));

// A line through all curves at a step, and what they are there.
function point(step) {
  for (const { element, last_step: last, series } of charts) {
    const texts = series.flatMap(({ label, steps, values }) => {
      const place = steps.findLastIndex((one) => one <= step);
      return place < 0 ? [] : [`${label} ${values[place]}${steps[place] === step ? "" : ` (step ${steps[place]})`}`];
    });
    find(".reading", element).textContent = `step ${step}: ${texts.join("; ")}`;
    const cursor = find(".cursor", element);
    cursor.hidden = false;
    cursor.style.setProperty("--at", `${(100 * step) / Math.max(1, last)}%`);
  }
  pointed = step;
}
let pointed = null;

for (const { element, last_step: last, series } of charts) {
  const plot = find(".plot", element);
  const made = Math.max(...series.flatMap(({ steps }) => steps)); // the last step that a curve has
  const held = (step) => Math.round(Math.min(Math.max(step, 1), made));
  const follow = (event) => {
    const box = plot.getBoundingClientRect();
    point(held((last * (event.clientX - box.left)) / box.width));
  };
  plot.addEventListener("pointermove", follow);
  plot.addEventListener("pointerdown", follow);
  element.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: -1, ArrowRight: 1, PageDown: -10, PageUp: 10, Home: -Infinity, End: Infinity }[event.key];
    if (!way || modified(event)) return;
    event.preventDefault();
    point(held((pointed ?? made) + way * Math.max(1, Math.round(last / 100))));
  });
}

// --- configuration ----------------------------------------------------------------------------------------------------

const flags = findAll(".config tr");

function filterFlags() {
  const wanted = find("#filter").value.trim().toLowerCase();
  const only = find("#changed").checked;
  for (const row of flags) {
    row.hidden = !row.textContent.toLowerCase().includes(wanted) || (only && !row.classList.contains("changed"));
  }
  find("#count").textContent = `${flags.filter((row) => !row.hidden).length} of ${flags.length} flags`;
}
find("#filter").addEventListener("input", filterFlags);
find("#changed").addEventListener("change", filterFlags);

// --- start ------------------------------------------------------------------------------------------------------------

if (slider) find("output[for=step]").textContent = data.steps.at(-1);
filterFlags();
for (const element of findAll(".bar, .tools")) element.hidden = false;
