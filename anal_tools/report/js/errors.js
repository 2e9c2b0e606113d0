// Pages about errors: the matrix and its videos, mistakes and class pairs, labels in doubt.

function matrixSection() {
    const side = h("div", { class: "side" }, h("p", { class: "note" }, "Choose a cell to see its videos."));
    const matrix = new Matrix((truth, guess) => {
        const rows = rowsWhere((row) => labels[row] === truth && guessOf(row) === guess);
        const title =
            truth === guess
                ? [named(className(truth)), ", recognised"]
                : [named(className(truth)), " mistaken for ", named(className(guess))];
        side.replaceChildren(
            h("h3", {}, title),
            h("p", {}, linkToVideos({ truth, guess }, `${count(rows.length, "video")} in the list`)),
            cards(rows, { page: 6, empty: "No video in this cell." }),
        );
        announce(`${count(rows.length, "video")} of ${className(truth)} predicted as ${className(guess)}`);
    });
    const orders = [
        ["list", "as in the list"],
        ["hardest", "hardest first"],
        ["videos", "most videos first"],
        ["name", "by name"],
    ];
    if (report.experiments[current].alike) orders.splice(1, 0, ["alike", "confused classes together"]);
    const button = (text, label, action) => h("button", { type: "button", "aria-label": label, onclick: action }, text);
    const controls = h(
        "div",
        { class: "controls" },
        select("Order", orders, "list", (kind) => matrix.sort(kind)),
        select(
            "Colour",
            [
                ["share", "share of the true class"],
                ["count", "number of videos"],
            ],
            "share",
            (kind) => {
                matrix.shares = kind === "share";
                matrix.paint();
            },
        ),
        h(
            "span",
            { class: "group" },
            button("+", "zoom in", () => matrix.zoom(0.6)),
            button("−", "zoom out", () => matrix.zoom(1 / 0.6)),
            button("show all", "show the whole matrix", () => matrix.reset()),
            button("next error", "go to the next most frequent error", () => matrix.jump(1)),
        ),
    );
    queueMicrotask(() => matrix.paint());
    return [
        h(
            "section",
            { class: "panel" },
            h("h2", {}, "Confusion matrix"),
            controls,
            h(
                "div",
                { class: "split" },
                h(
                    "div",
                    {},
                    matrix.canvas,
                    matrix.info,
                    h(
                        "p",
                        { class: "note" },
                        "Rows: true, columns: predicted. Click the matrix, then zoom with the wheel; drag to move. ",
                        h("kbd", {}, "←↑↓→"),
                        " ",
                        h("kbd", {}, "Enter"),
                        " ",
                        h("kbd", {}, "n"),
                        " ",
                        h("kbd", {}, "+"),
                        " ",
                        h("kbd", {}, "−"),
                        " ",
                        h("kbd", {}, "0"),
                        " work too.",
                    ),
                ),
                side,
            ),
        ),
    ];
}

function errorsSection() {
    const { videos } = confusion(current);
    const pairs = errorPairs(current).slice(0, report.listed);
    const items = pairs.map((pair) => {
        const inside = h("div");
        const details = h(
            "details",
            {
                class: "pair",
                ontoggle: () => {
                    if (details.open && !inside.firstChild) {
                        inside.append(
                            cards(
                                rowsWhere((row) => labels[row] === pair.truth && guessOf(row) === pair.guess),
                                { page: 6 },
                            ),
                        );
                    }
                },
            },
            h(
                "summary",
                {},
                h(
                    "span",
                    { class: "names" },
                    named(className(pair.truth)),
                    " mistaken for ",
                    named(className(pair.guess)),
                ),
                bar(pair.count / videos[pair.truth], "wrong"),
                h("span", { class: "number" }, `${pair.count} of ${videos[pair.truth]}`),
            ),
            inside,
        );
        return h("li", {}, details);
    });
    return [
        h(
            "section",
            { class: "panel" },
            h("h2", {}, "Most confident mistakes"),
            h("p", { class: "note" }, report.pictures),
            report.maps[current] ? h("p", { class: "note" }, mapsNote()) : null,
            cards(worstVideos(current), { page: 12, empty: "No video is wrong." }),
        ),
        h(
            "section",
            { class: "panel" },
            h("h2", {}, "Most frequent class pairs"),
            h("p", { class: "note" }, allowedNote()),
            pairs.length
                ? h("ol", { class: "pairs" }, items)
                : h("p", { class: "note" }, "No class was mistaken for another."),
        ),
    ];
}

function mapsNote() {
    const looked = Object.values(report.media).find((media) => media.maps?.[current])?.maps[current];
    if (!looked) return report.maps[current];
    const meaning =
        looked.shown[0][0] < 0
            ? " the redder a place, the more it contributed to the output, whatever the class."
            : " the redder a place, the more it supported the class.";
    return [
        `Maps: ${report.maps[current]} The buttons below the frames switch to them: `,
        h("span", { class: "heat", role: "img", "aria-label": "a scale from grey through yellow to red" }),
        meaning,
    ];
}

function allowedNote() {
    if (!report.allowed.length) return "Open a pair to see its videos.";
    return `Open a pair to see its videos. ${count(report.allowed.length, "allowed pair")} left out.`;
}

function labelsSection() {
    const suspects = report.experiments[current].suspects;
    const columns = [
        {
            title: "video",
            value: (one) => videoName(one[0]),
            cell: (one) =>
                h(
                    "a",
                    { href: `#videos?${new URLSearchParams({ text: videoName(one[0]) })}` },
                    named(videoName(one[0])),
                ),
        },
        { title: "label", value: (one) => className(labels[one[0]]), cell: (one) => named(className(labels[one[0]])) },
        { title: "perhaps", value: (one) => className(one[1]), cell: (one) => named(className(one[1])) },
        { title: "score", value: (one) => one[2], cell: (one) => percent(one[2]), number: true },
        { title: "score of the label", value: (one) => one[3], cell: (one) => percent(one[3]), number: true },
    ];
    return [
        h(
            "section",
            { class: "panel" },
            h("h2", {}, "Suspected label errors"),
            h(
                "p",
                { class: "note" },
                "Confident learning (Northcutt, Jiang and Chuang, JAIR 2021): the score of another class reaches " +
                    "the mean score of the videos labelled with that class. Sorted by how far the other class is " +
                    "ahead. Watch a video before you change its label: a mistake of the model looks the same here.",
            ),
            suspects.length && current === 0 && report.suspects
                ? h(
                      "p",
                      { class: "note" },
                      "The same as a table: ",
                      h("a", { href: report.suspects, download: report.suspects }, report.suspects),
                      ". Delete the rows whose label is right. Then ",
                      h("code", {}, `main.py lists LIST --relabel ${report.suspects} --out NEW`),
                      " writes a list with the suggested labels, or with ",
                      h("code", {}, "--drop"),
                      " a list without these videos.",
                  )
                : null,
            suspects.length ? table(columns, suspects, { page: 50 }) : h("p", { class: "note" }, "None."),
        ),
        suspects.length
            ? h(
                  "section",
                  { class: "panel" },
                  h("h2", {}, "Most suspicious videos"),
                  cards(suspects.slice(0, 12).map((one) => one[0])),
              )
            : null,
    ];
}
