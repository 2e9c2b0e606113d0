// The first page: numbers, what is hardest, and curves.

const FEW = 30; // videos; `start` warns below the same number

function summarySection() {
    return [
        h(
            "section",
            { class: "panel" },
            h("h2", {}, "Evaluation"),
            factsTable(),
            h(
                "p",
                { class: "note" },
                "In brackets: 95 % intervals (Wilson for top-1 and top-5, bootstrap over videos for the rest).",
            ),
            videoCount < FEW
                ? h(
                      "p",
                      { class: "note" },
                      `${videoCount} videos are too few for a reliable accuracy: one video changes it by ` +
                          `${(100 / videoCount).toFixed(1)} points. Folds hold out each video once (data.folds).`,
                  )
                : null,
        ),
        ...report.experiments.filter((one) => one.folds).map(foldsPanel),
        h(
            "div",
            { class: "columns" },
            h("section", { class: "panel" }, h("h2", {}, "Hardest classes"), hardest()),
            h("section", { class: "panel" }, h("h2", {}, "Most frequent errors"), frequent()),
        ),
        h("section", { class: "panel" }, h("h2", {}, "Accuracy against cost"), costChart()),
        h(
            "section",
            { class: "panel" },
            h("h2", {}, "Training"),
            report.experiments.some((one) => one.folds)
                ? h("p", { class: "note" }, "The curves of an experiment with folds are the mean of its folds.")
                : null,
            h("div", { class: "columns" }, curveCharts()),
        ),
    ];
}

/** What was evaluated and the results: one row per item, one column per experiment. */
function factsTable() {
    const rows = report.experiments[0].overview.map(([title]) => title);
    const value = (one, title) => one.overview.find(([name]) => name === title)?.[1] ?? "–";
    return h(
        "div",
        { class: "table" },
        h(
            "table",
            { class: "overview" },
            h(
                "thead",
                {},
                h(
                    "tr",
                    {},
                    h("td", {}),
                    report.experiments.map((one) => h("th", { scope: "col" }, named(one.name))),
                ),
            ),
            h(
                "tbody",
                {},
                rows.map((title) =>
                    h(
                        "tr",
                        {},
                        h("th", { scope: "row" }, title),
                        report.experiments.map((one) => h("td", {}, named(value(one, title)))),
                    ),
                ),
            ),
        ),
    );
}

/** The numbers of each fold, their mean and standard deviation, and those of all held-out videos together. */
function foldsPanel(one) {
    const { columns, rows, mean, std, all } = one.folds;
    const cells = (values) => values.map((value) => h("td", { class: "number" }, value.toFixed(2)));
    const line = (title, videos, values, kind = null) =>
        h(
            "tr",
            { class: kind },
            h("th", { scope: "row" }, title),
            h("td", { class: "number" }, videos),
            cells(values),
        );
    const heads = ["fold", "videos", ...columns.map((title) => `${title}, %`)];
    const name = report.experiments.length > 1 ? [" of ", named(one.name)] : null;
    return h(
        "section",
        { class: "panel" },
        h("h2", {}, "Folds", name),
        h(
            "div",
            { class: "table" },
            h(
                "table",
                { class: "folds" },
                h(
                    "thead",
                    {},
                    h(
                        "tr",
                        {},
                        heads.map((title, i) => h("th", { scope: "col", class: i && "number" }, title)),
                    ),
                ),
                h(
                    "tbody",
                    {},
                    rows.map(([fold, videos, values]) => line(fold, String(videos), values)),
                    line("mean", "", mean, "first"),
                    std && line("standard deviation", "", std),
                    line("all held-out videos", String(rows.reduce((sum, row) => sum + row[1], 0)), all, "first"),
                ),
            ),
        ),
        h(
            "p",
            { class: "note" },
            "Each video was held out once and scored by a network that never saw it. All pages show all videos.",
        ),
    );
}

function hardest() {
    const { counts, videos } = confusion(current);
    const recall = (k) => counts[k * classCount + k] / videos[k];
    const worst = classOrder("hardest")
        .filter((k) => videos[k] > 0 && recall(k) < 1)
        .slice(0, 8);
    if (!worst.length) return h("p", { class: "note" }, "Every video was classified correctly.");
    return h(
        "ul",
        { class: "plain" },
        worst.map((k) =>
            h(
                "li",
                {},
                linkToVideos({ truth: k, outcome: "wrong" }, named(className(k))),
                bar(recall(k)),
                h("span", { class: "number" }, `${counts[k * classCount + k]} of ${videos[k]}`),
            ),
        ),
    );
}

function frequent() {
    const pairs = errorPairs(current).slice(0, 8);
    if (!pairs.length) return h("p", { class: "note" }, "No class was mistaken for another.");
    const { videos } = confusion(current);
    return h(
        "ul",
        { class: "plain" },
        pairs.map((pair) =>
            h(
                "li",
                {},
                linkToVideos(
                    { truth: pair.truth, guess: pair.guess },
                    named(className(pair.truth)),
                    " mistaken for ",
                    named(className(pair.guess)),
                ),
                bar(pair.count / videos[pair.truth], "wrong"),
                h("span", { class: "number" }, `${pair.count} of ${videos[pair.truth]}`),
            ),
        ),
    );
}

/** Top-1 with all kept views and with fewer, against views or GMACs. */
function costChart() {
    const usable = report.experiments.filter((one) => one.views.length);
    if (!usable.length) return h("p", { class: "note" }, "The views of these results were not kept.");
    const hasCost = usable.every((one) => one.views.every((point) => point.gmacs));
    const cost = (point) => (hasCost ? point.gmacs : point.views);
    const single = usable.every((one) => one.views.length === 1);
    const series = usable.map((one) => ({
        name: one.name,
        color: report.experiments.indexOf(one),
        dots: true,
        points: one.views.map((point) => [cost(point), point.top1]),
        notes: one.views.map((point) =>
            [
                `${one.name}: ${point.text}: top-1 ${point.top1.toFixed(2)} %`,
                point.gmacs && `${point.gmacs.toFixed(1)} GMACs`,
            ]
                .filter(Boolean)
                .join(", "),
        ),
    }));
    const rows = usable.flatMap((one) => one.views.map((point) => ({ one, point })));
    const columns = [
        { title: "experiment", value: (row) => row.one.name, cell: (row) => named(row.one.name) },
        { title: "views", value: (row) => row.point.views, cell: (row) => row.point.text },
        {
            title: "GMACs per video",
            value: (row) => row.point.gmacs,
            cell: (row) => (row.point.gmacs ? row.point.gmacs.toFixed(2) : "–"),
            number: true,
        },
        { title: "top-1 %", value: (row) => row.point.top1, cell: (row) => row.point.top1.toFixed(2), number: true },
        { title: "top-5 %", value: (row) => row.point.top5, cell: (row) => row.point.top5.toFixed(2), number: true },
    ];
    const advice = [...new Set(usable.map((one) => one.advice).filter(Boolean))].join(" ");
    const note = single
        ? advice
        : "Smaller protocols use some of the kept views; (near) marks the nearest ones available.";
    if (single) return [table(columns, rows), h("p", { class: "note" }, note)];
    return h(
        "div",
        { class: "columns" },
        lineChart(series, {
            x: hasCost ? "GMACs per video" : "views per video",
            y: "top-1, per cent",
            title: "Top-1 with all kept views and with fewer",
            logX: true,
            percentY: true,
        }),
        h("div", {}, table(columns, rows), h("p", { class: "note" }, note)),
    );
}

/** Loss, accuracy and learning rate over the iterations; one colour per experiment, dots for validation. */
function curveCharts() {
    const charts = [
        [
            "Loss",
            "loss",
            [
                ["loss_train", "training"],
                ["loss_val", "validation"],
            ],
            false,
        ],
        [
            "Top-1",
            "per cent",
            [
                ["top1_train", "training"],
                ["top1_val", "validation"],
            ],
            true,
        ],
        ["Learning rate", "learning rate", [["lr", ""]], false],
    ];
    return charts.map(([title, unit, tags, percentY]) => {
        const series = report.experiments.flatMap((one, color) =>
            tags
                .filter(([tag]) => one.curves[tag])
                .map(([tag, what]) => ({
                    name:
                        [report.experiments.length > 1 ? one.name : "", what].filter(Boolean).join(", ") ||
                        title.toLowerCase(),
                    color,
                    dots: what === "validation",
                    dashed: what === "training",
                    points: one.curves[tag],
                })),
        );
        return lineChart(series, { x: "iteration", y: unit, title, percentY });
    });
}
