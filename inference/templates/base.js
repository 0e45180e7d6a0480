// What both pages' scripts share. Texts go in as text and never as markup, since prompts and names may hold anything.

const find = (selector, inside = document) => inside.querySelector(selector);
const findAll = (selector, inside = document) => [...inside.querySelectorAll(selector)];
const make = (tag, text) => Object.assign(document.createElement(tag), { textContent: text });
const modified = (event) => event.ctrlKey || event.metaKey || event.altKey; // the browser's own, such as Alt+←

const data = JSON.parse(find("#data").textContent);

// Says into `output` whether it worked. Some browsers refuse a page from disk: then the text is there to be selected.
async function copyText(text, output, shown) {
  try {
    await navigator.clipboard.writeText(text);
    output.textContent = "copied";
  } catch {
    shown.hidden = false;
    getSelection().selectAllChildren(shown);
    if (shown.select) shown.select();
    output.textContent = "selected: press Ctrl+C";
  }
}

// --- theme ------------------------------------------------------------------------------------------------------------

const THEMES = ["auto", "light", "dark"];

// Some browsers refuse storage to a page from disk: then the choice lasts as long as the page.
function storedTheme() {
  try {
    return localStorage.getItem("theme");
  } catch {
    return null;
  }
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  find("#theme").textContent = `Theme: ${theme}`;
  try {
    localStorage.setItem("theme", theme);
  } catch {}
}
find("#theme").addEventListener("click", () => {
  setTheme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length]);
});
setTheme(THEMES.includes(storedTheme()) ? storedTheme() : "auto");

// What sticks below the bar does so whatever the bar's height.
const top = find(".top");
new ResizeObserver(() => {
  document.documentElement.style.setProperty("--top", `${top.offsetHeight}px`);
}).observe(top);
