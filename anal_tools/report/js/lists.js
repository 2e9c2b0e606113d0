// Pages of all classes and of all videos.

/** The 95 % score interval of a share of n (Wilson 1927); wide for a class with few videos, and within 0..1. */
function wilson(share, n, z = 1.959964) {
    if (!n) return [NaN, NaN];
    const middle = share + (z * z) / (2 * n);
    const half = z * Math.sqrt((share * (1 - share)) / n + (z * z) / (4 * n * n));
    return [middle - half, middle + half].map((end) => clamp(end / (1 + (z * z) / n), 0, 1));
}

function classesSection() {
    const { counts, videos } = confusion(current);
    const own = report.experiments[current].classes;
    const rows = [...Array(classCount).keys()];
    const recall = (k, index = current) => {
        const found = confusion(index);
        return found.videos[k] ? found.counts[k * classCount + k] / found.videos[k] : NaN;
    };
    const confused = (k) => {
        let best = -1;
        for (let guess = 0; guess < classCount; guess += 1) {
            if (guess !== k && counts[k * classCount + guess] > (best < 0 ? 0 : counts[k * classCount + best]))
                best = guess;
        }
        return best;
    };
    const bars = (k) =>
        report.experiments.map((one, index) =>
            h(
                "span",
                { class: "line", title: `${one.name}: ${percent(recall(k, index))}` },
                bar(recall(k, index), `series-${index}`),
            ),
        );
    const columns = [
        { title: "class", value: className, cell: (k) => linkToVideos({ truth: k }, named(className(k))) },
        { title: "right", value: recall, cell: bars, down: false },
        { title: "recall", value: recall, cell: (k) => percent(recall(k)), number: true, down: false },
        {
            title: "95 % interval",
            value: (k) => wilson(recall(k), videos[k])[0],
            cell: (k) => wilson(recall(k), videos[k]).map((end) => (100 * end).toFixed(0)).join(" to "),
            number: true,
        },
        { title: "precision", value: (k) => own.precision[k], cell: (k) => percent(own.precision[k]), number: true },
        { title: "average precision", value: (k) => own.ap[k], cell: (k) => percent(own.ap[k]), number: true },
        { title: "videos", value: (k) => videos[k], number: true },
        {
            title: "most often mistaken for",
            value: (k) => (confused(k) < 0 ? 0 : counts[k * classCount + confused(k)]),
            down: true,
            cell: (k) =>
                confused(k) < 0
                    ? "–"
                    : linkToVideos(
                          { truth: k, guess: confused(k) },
                          named(className(confused(k))),
                          ` ${counts[k * classCount + confused(k)]}`,
                      ),
        },
    ];
    const place = h("div");
    const draw = (text) =>
        place.replaceChildren(
            table(
                columns,
                rows.filter((k) => className(k).toLowerCase().includes(text.toLowerCase())),
                { page: 500, sorted: [2, false] },
            ),
        );
    const search = h("input", { type: "search", placeholder: "part of a name", oninput: () => draw(search.value) });
    draw("");
    return [
        h(
            "section",
            { class: "panel" },
            h("h2", {}, "Classes"),
            h(
                "div",
                { class: "controls" },
                h("label", { class: "field" }, "Find ", search),
                report.experiments.length > 1
                    ? legend(report.experiments.map((one, color) => ({ name: one.name, color })))
                    : null,
            ),
            place,
        ),
    ];
}

const OUTCOMES = [
    ["all", "all"],
    ["wrong", "wrong"],
    ["right", "right"],
    ["unread", "could not be read"],
];

function videosSection(wanted) {
    const all = [["", "any"], ...[...Array(classCount).keys()].map((k) => [k, className(k)])];
    const rivals = report.experiments.flatMap((one, a) =>
        report.experiments.flatMap((other, b) =>
            a === b ? [] : [[`${a}-${b}`, `${one.name} right, ${other.name} wrong`]],
        ),
    );
    // The address may contain anything: a value that a list does not offer selects its first entry.
    const chosen = (name, options, usual = "") =>
        options.some(([key]) => String(key) === wanted.get(name)) ? wanted.get(name) : usual;
    const state = {
        truth: chosen("truth", all),
        guess: chosen("guess", all),
        outcome: chosen("outcome", OUTCOMES, "all"),
        text: wanted.get("text") ?? "",
        rival: chosen("rival", rivals),
    };
    const place = h("div");
    const draw = () => {
        const text = state.text.toLowerCase();
        const [a, b] = state.rival ? state.rival.split("-").map(Number) : [];
        const rows = rowsWhere(
            (row) =>
                (state.truth === "" || labels[row] === Number(state.truth)) &&
                (state.guess === "" || guessOf(row) === Number(state.guess)) &&
                (state.outcome === "all"
                    ? isSeen(row)
                    : state.outcome === "right"
                      ? isRight(row)
                      : state.outcome === "wrong"
                        ? isWrong(row)
                        : guessOf(row) === UNREAD) &&
                (!state.rival || (isRight(row, a) && isWrong(row, b))) &&
                (!text || videoName(row).toLowerCase().includes(text)),
        );
        place.replaceChildren(
            h("p", { class: "note", "aria-live": "polite" }, `${count(rows.length, "video")}, most confident first`),
            cards(rows),
        );
    };
    const change = (key) => (value) => {
        state[key] = value;
        history.replaceState(
            null,
            "",
            `#videos?${new URLSearchParams(Object.entries(state).filter(([, text]) => text !== ""))}`,
        );
        draw();
    };
    const search = h("input", {
        type: "search",
        value: state.text,
        placeholder: "part of a path",
        onchange: () => change("text")(search.value),
    });
    draw();
    return [
        h(
            "section",
            { class: "panel" },
            h("h2", {}, "Videos"),
            h(
                "div",
                { class: "controls" },
                select("True class", all, state.truth, change("truth")),
                select("Predicted", all, state.guess, change("guess")),
                select("Outcome", OUTCOMES, state.outcome, change("outcome")),
                rivals.length ? select("Between", [["", "–"], ...rivals], state.rival, change("rival")) : null,
                h("label", { class: "field" }, "Find ", search),
            ),
            place,
        ),
    ];
}
