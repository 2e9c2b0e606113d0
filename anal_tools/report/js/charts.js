// Line charts as SVG. Colours come from the style sheet: series i has the class `series-i`.

/** About `wanted` round numbers between low and high. */
function ticks(low, high, wanted = 5) {
    const span = high - low || 1;
    const rough = span / wanted;
    const unit = 10 ** Math.floor(Math.log10(rough));
    const step = unit * [1, 2, 5, 10].find((factor) => factor * unit >= rough);
    const found = [];
    for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-9; value += step)
        found.push(Number(value.toPrecision(12)));
    return found;
}

/**
 * A chart of lines.
 *
 * series: [{name, color, points: [[x, y]], dashed, dots, notes: [text of each point]}]
 */
function lineChart(series, { x: xTitle, y: yTitle, title, logX = false, percentY = false } = {}) {
    const [width, height, left, right, top, bottom] = [560, 300, 58, 16, 14, 44];
    const lines = series.map((one) => ({ ...one, points: one.points.filter((point) => point.every(Number.isFinite)) }));
    const all = lines.flatMap((one) => one.points);
    if (all.length === 0) return h("p", { class: "note" }, `${title}: nothing was recorded`);
    const place = logX ? Math.log : (value) => value;
    const xs = all.map((point) => place(point[0]));
    const ys = all.map((point) => point[1]);
    const [x0, x1] = spread(Math.min(...xs), Math.max(...xs), 0.0);
    const [y0, y1] = spread(Math.min(...ys), Math.max(...ys), 0.06, percentY ? [0, 100] : [0, Infinity]);
    const toX = (value) => left + ((place(value) - x0) / (x1 - x0)) * (width - left - right);
    const toY = (value) => height - bottom - ((value - y0) / (y1 - y0)) * (height - top - bottom);
    const xTicks = logX ? [...new Set(all.map((point) => point[0]))].sort((a, b) => a - b) : ticks(x0, x1);

    const grid = [
        ticks(y0, y1).map((value) => [
            svg("line", { class: "grid", x1: left, x2: width - right, y1: toY(value), y2: toY(value) }),
            svg("text", { class: "tick", x: left - 8, y: toY(value) + 4, "text-anchor": "end" }, String(value)),
        ]),
        thin(xTicks, toX).map((value) =>
            svg(
                "text",
                { class: "tick", x: toX(value), y: height - bottom + 18, "text-anchor": "middle" },
                shortNumber(value),
            ),
        ),
        svg("text", { class: "axis", x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, xTitle),
        svg(
            "text",
            {
                class: "axis",
                x: 0,
                y: 0,
                "text-anchor": "middle",
                transform: `translate(13 ${(top + height - bottom) / 2}) rotate(-90)`,
            },
            yTitle,
        ),
    ];
    const drawn = lines.map((one) => {
        const path = one.points
            .map(([x, y], i) => `${i ? "L" : "M"}${toX(x).toFixed(1)} ${toY(y).toFixed(1)}`)
            .join("");
        const dots =
            one.dots || one.points.length === 1
                ? one.points.map(([x, y], i) =>
                      svg(
                          "circle",
                          { class: "dot", cx: toX(x), cy: toY(y), r: one.big === i ? 7 : 4 },
                          svg("title", {}, one.notes?.[i] ?? `${one.name}: ${x}, ${y.toFixed(2)}`),
                      ),
                  )
                : null;
        return svg(
            "g",
            { class: `series series-${one.color ?? 0}` },
            one.bare ? null : svg("path", { class: one.dashed ? "line dashed" : "line", d: path }),
            dots,
        );
    });
    const picture = svg(
        "svg",
        { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title, class: "chart" },
        grid,
        drawn,
    );
    return h("figure", {}, h("figcaption", {}, title), picture, legend(lines));
}

function legend(lines) {
    return h(
        "ul",
        { class: "legend" },
        lines.map((one) =>
            h(
                "li",
                {},
                h("span", { class: `swatch series-${one.color ?? 0}${one.dashed ? " dashed" : ""}` }),
                named(one.name),
            ),
        ),
    );
}

/** A little room around a range, within limits; never an empty range. */
function spread(low, high, room, [least, most] = [-Infinity, Infinity]) {
    const space = (high - low || Math.abs(high) || 1) * room;
    const range = [Math.max(least, low - space), Math.min(most, high + space)];
    return range[0] < range[1] ? range : [range[0] - 0.5, range[0] + 0.5];
}

/** Ticks that do not run into each other. */
function thin(values, toX) {
    let last = -Infinity;
    return values.filter((value) => {
        if (toX(value) - last < 34) return false;
        last = toX(value);
        return true;
    });
}

const shortNumber = (value) =>
    value >= 10000 ? `${Number((value / 1000).toFixed(1))}k` : String(Number(value.toPrecision(3)));
