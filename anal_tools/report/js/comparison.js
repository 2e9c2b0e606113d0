// The page that compares experiments.

function compareSection() {
    const { pairs, differences, notes } = report.comparison;
    const name = (index) => named(report.experiments[index].name);
    const tests = [
        { title: "A", value: (one) => one.a, cell: (one) => name(one.a) },
        { title: "B", value: (one) => one.b, cell: (one) => name(one.b) },
        { title: "shared videos", value: (one) => one.videos, number: true },
        {
            title: "only A right",
            value: (one) => one.only_a,
            cell: (one) => linkToVideos({ rival: `${one.a}-${one.b}` }, String(one.only_a)),
            number: true,
        },
        {
            title: "only B right",
            value: (one) => one.only_b,
            cell: (one) => linkToVideos({ rival: `${one.b}-${one.a}` }, String(one.only_b)),
            number: true,
        },
        {
            title: "B − A",
            value: (one) => one.difference,
            cell: (one) => `${one.difference > 0 ? "+" : ""}${one.difference.toFixed(2)} points`,
            number: true,
        },
        {
            title: "95 % interval",
            value: (one) => one.interval[0],
            cell: (one) => one.interval.map((end) => end.toFixed(2)).join(" to "),
            number: true,
        },
        {
            title: "p (McNemar)",
            value: (one) => one.p,
            cell: (one) => (one.p < 1e-4 ? one.p.toExponential(1) : one.p.toFixed(4)),
            number: true,
        },
    ];
    const configs = [
        { title: "key", value: (one) => one[0], cell: (one) => h("code", {}, one[0]) },
        ...report.experiments.map((one, index) => ({
            title: one.name,
            value: (row) => row[1][index],
            cell: (row) => h("code", {}, row[1][index]),
        })),
    ];
    return [
        h(
            "section",
            { class: "panel" },
            h("h2", {}, "Experiments"),
            notes.map((text) => h("p", { class: "note" }, text)),
            table(tests, pairs),
            h(
                "p",
                { class: "note" },
                "p is from an exact two-sided McNemar test: if both were equally good, it is the chance that the " +
                    "videos that only one of them gets right would split at least this unevenly. Interval of the " +
                    "difference: bootstrap over the shared videos.",
            ),
        ),
        ...pairs.slice(0, report.experiments.length - 1).map(classDifferences),
        h(
            "section",
            { class: "panel" },
            h("h2", {}, "Config differences"),
            differences.length ? table(configs, differences, { page: 200 }) : h("p", { class: "note" }, "None."),
        ),
    ];
}

function classDifferences(pair) {
    const rows = pair.classes
        .map((change, k) => ({ k, change }))
        .filter((row) => Number.isFinite(row.change) && row.change !== 0)
        .sort((x, y) => Math.abs(y.change) - Math.abs(x.change) || x.k - y.k);
    const columns = [
        {
            title: "class",
            value: (row) => className(row.k),
            cell: (row) => linkToVideos({ truth: row.k }, named(className(row.k))),
        },
        {
            title: "recall, B − A",
            value: (row) => row.change,
            number: true,
            cell: (row) => `${row.change > 0 ? "+" : ""}${(100 * row.change).toFixed(1)}`,
        },
        {
            title: "loss | gain",
            value: (row) => row.change,
            cell: (row) =>
                h(
                    "span",
                    { class: "diverging" },
                    h("span", {}, row.change < 0 ? bar(-row.change, "wrong") : null),
                    h("span", {}, row.change > 0 ? bar(row.change, "right") : null),
                ),
        },
    ];
    const title = ["From ", named(report.experiments[pair.a].name), " to ", named(report.experiments[pair.b].name)];
    return h(
        "section",
        { class: "panel" },
        h("h2", {}, title),
        rows.length
            ? table(columns, rows, { page: 30 })
            : h("p", { class: "note" }, "Every class is recognised equally often."),
    );
}
