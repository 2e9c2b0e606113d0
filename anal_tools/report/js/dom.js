// Building blocks of the page. Users choose names, so everything goes in as text, never as HTML.

/** An element: h("p", {class: "note", onclick: f}, "text", child, [children]); absent attributes are left out. */
function h(tag, attributes = {}, ...children) {
    return fill(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
function svg(tag, attributes = {}, ...children) {
    return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) {
        if (value === null || value === undefined || value === false) continue;
        if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
        else element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
    return element;
}

/** A name that a user chose, isolated from the text around it (it may be right-to-left). */
const named = (text) => h("bdi", {}, text);

const percent = (share, digits = 1) => (Number.isFinite(share) ? `${(100 * share).toFixed(digits)} %` : "–");
const count = (number, one, many = `${one}s`) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;

/** A horizontal bar for a share in 0..1; hidden from screen readers, since a number always stands next to it. */
function bar(share, kind = "right") {
    const inner = h("span", { class: `fill ${kind}` });
    inner.style.width = `${100 * Math.max(0, Math.min(1, share || 0))}%`;
    return h("span", { class: "bar", "aria-hidden": "true" }, inner);
}

/**
 * A table that can be sorted by its column heads, and that shows `page` rows at first.
 *
 * columns: {title, value(row), cell(row) (default: the value), number: true, down: true (largest first)}
 */
function table(columns, rows, { page: size = 100, sorted = null, caption = "" } = {}) {
    let [column, down] = sorted ?? [null, false];
    let shown = size;
    const body = h("tbody");
    const more = h("button", { class: "more", type: "button", onclick: () => ((shown += 5 * size), draw()) });
    const heads = columns.map((one, index) =>
        h(
            "th",
            { class: one.number && "number", scope: "col" },
            h("button", { type: "button", onclick: () => sort(index) }, one.title),
        ),
    );

    function sort(index) {
        down = column === index ? !down : Boolean(columns[index].down ?? columns[index].number);
        column = index;
        draw();
    }

    function draw() {
        const list = [...rows];
        if (column !== null) {
            const { value } = columns[column];
            list.sort((a, b) => (down ? compareValues(value(b), value(a)) : compareValues(value(a), value(b))));
        }
        heads.forEach((head, index) => {
            if (index === column) head.setAttribute("aria-sort", down ? "descending" : "ascending");
            else head.removeAttribute("aria-sort");
        });
        body.replaceChildren(
            ...list.slice(0, shown).map((row) =>
                h(
                    "tr",
                    {},
                    columns.map((one) =>
                        h("td", { class: one.number && "number" }, (one.cell ?? ((r) => String(one.value(r))))(row)),
                    ),
                ),
            ),
        );
        more.hidden = list.length <= shown;
        more.textContent = `${count(list.length - shown, "more row")}`;
    }

    draw();
    return h(
        "div",
        { class: "table" },
        h("table", {}, caption ? h("caption", {}, caption) : null, h("thead", {}, h("tr", {}, heads)), body),
        more,
    );
}

function compareValues(a, b) {
    if (typeof a === "string" || typeof b === "string")
        return String(a).localeCompare(String(b), "en", { numeric: true });
    const [x, y] = [a, b].map((value) => (Number.isFinite(value) ? value : -Infinity));
    return x < y ? -1 : x > y ? 1 : 0;
}

/** A labelled drop-down; options: [[value, text]]. */
function select(label, options, value, onchange) {
    const box = h(
        "select",
        { onchange: () => onchange(box.value) },
        options.map(([key, text]) => h("option", { value: key, selected: String(key) === String(value) }, text)),
    );
    return h("label", { class: "field" }, `${label} `, box);
}

/** Read a text out to users of a screen reader. */
function announce(text) {
    document.getElementById("announce").textContent = text;
}
