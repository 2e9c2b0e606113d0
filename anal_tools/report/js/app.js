// The address decides which page is shown: #matrix, #videos?truth=3&guess=5. Pages are built when they are first shown.

const SECTIONS = {
    summary: summarySection,
    matrix: matrixSection,
    errors: errorsSection,
    classes: classesSection,
    videos: videosSection,
    labels: labelsSection,
    compare: compareSection,
};

const main = document.getElementById("page");
const built = new Map();

function show() {
    const [wanted, query = ""] = decodeHash();
    const name = Object.hasOwn(SECTIONS, wanted) && (wanted !== "compare" || report.comparison) ? wanted : "summary";
    // Build the list of videos again for each query; the other sections keep what was opened in them.
    if (name === "videos") built.delete(name);
    if (!built.has(name)) built.set(name, SECTIONS[name](new URLSearchParams(query)).filter(Boolean));
    main.replaceChildren(...built.get(name));
    for (const link of document.querySelectorAll("nav a")) {
        if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
        else link.removeAttribute("aria-current");
    }
    document.documentElement.dataset.section = name;
}

function decodeHash() {
    const text = location.hash.slice(1);
    const at = text.indexOf("?");
    return at < 0 ? [text] : [text.slice(0, at), text.slice(at + 1)];
}

function chooser() {
    if (report.experiments.length < 2) return;
    document.getElementById("chooser").append(
        select(
            "Predictions of",
            report.experiments.map((one, index) => [index, one.name]),
            current,
            (index) => {
                current = Number(index);
                built.clear();
                show();
            },
        ),
    );
}

chooser();
addEventListener("hashchange", () => {
    show();
    scrollTo(0, 0);
});
show();
document.documentElement.dataset.ready = "yes";
