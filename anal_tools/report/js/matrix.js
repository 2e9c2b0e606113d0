// The confusion matrix on a canvas: zoom, move, sort, open a cell's videos. Rows: true class; columns: predicted class.

const GUTTER = 132; // room for class names, when they are large enough to be read
const NAMES_FROM = 11; // cell size in pixels from which rows and columns show their names
const COUNTS_FROM = 22; // cell size in pixels from which a cell shows its count

/** The order of the classes for one choice of the `Order` list. */
function classOrder(kind) {
    const order = [...Array(classCount).keys()];
    const { counts, videos } = confusion(current);
    const recall = (k) => (videos[k] ? counts[k * classCount + k] / videos[k] : 2);
    if (kind === "name") order.sort((a, b) => className(a).localeCompare(className(b), "en", { numeric: true }));
    if (kind === "hardest") order.sort((a, b) => recall(a) - recall(b) || a - b);
    if (kind === "videos") order.sort((a, b) => videos[b] - videos[a] || a - b);
    if (kind === "alike") return [...words(report.experiments[current].alike)];
    return order;
}

class Matrix {
    constructor(onopen) {
        this.onopen = onopen;
        this.canvas = h("canvas", {
            tabindex: "0",
            role: "application",
            class: "matrix",
            "aria-label":
                "Confusion matrix. Arrow keys move, Enter lists the videos of a cell, n goes to the next largest " +
                "error, plus, minus and 0 zoom.",
        });
        this.info = h("p", { class: "info" }, " ");
        this.order = classOrder("list");
        this.shares = true;
        this.cell = null; // [row, column], places in the order
        this.view = { x: 0, y: 0, size: classCount }; // what is shown, in cells
        this.nextError = 0;
        this.listen();
        new ResizeObserver(() => this.draw()).observe(this.canvas);
        matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.paint());
    }

    listen() {
        const { canvas } = this;
        let from = null;
        canvas.addEventListener(
            "wheel",
            (event) => {
                if (document.activeElement !== canvas && !event.ctrlKey) return; // until then the page scrolls
                event.preventDefault();
                this.zoom(event.deltaY < 0 ? 0.8 : 1.25, this.at(event));
            },
            { passive: false },
        );
        canvas.addEventListener("pointerdown", (event) => {
            from = { x: event.clientX, y: event.clientY, view: { ...this.view }, moved: false };
            canvas.setPointerCapture(event.pointerId);
        });
        canvas.addEventListener("pointermove", (event) => {
            if (!from) return this.choose(this.cellAt(event), false);
            const [dx, dy] = [event.clientX - from.x, event.clientY - from.y];
            if (Math.hypot(dx, dy) > 4) from.moved = true;
            if (from.moved) this.move(from.view.x - dx / this.scale, from.view.y - dy / this.scale);
        });
        canvas.addEventListener("pointerup", (event) => {
            const clicked = from && !from.moved;
            from = null;
            if (!clicked) return;
            this.choose(this.cellAt(event), false);
            if (this.cell) this.open();
        });
        canvas.addEventListener("pointercancel", () => (from = null));
        canvas.addEventListener("dblclick", (event) => this.zoom(0.5, this.at(event)));
        canvas.addEventListener("keydown", (event) => this.key(event));
    }

    key(event) {
        const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
        if (event.ctrlKey || event.altKey || event.metaKey) return;
        if (steps[event.key]) {
            const [row, column] = this.cell ?? [0, 0];
            const [down, across] = this.cell ? steps[event.key] : [0, 0];
            this.choose([clamp(row + down, 0, classCount - 1), clamp(column + across, 0, classCount - 1)], true);
        } else if (event.key === "Enter" && this.cell) this.open();
        else if (event.key === "+" || event.key === "=") this.zoom(0.7);
        else if (event.key === "-") this.zoom(1 / 0.7);
        else if (event.key === "0") this.reset();
        else if (event.key === "n" || event.key === "N") this.jump(event.key === "n" ? 1 : -1);
        else return;
        event.preventDefault();
    }

    /** Reorder rows and columns, and show the whole matrix. */
    sort(kind) {
        this.order = classOrder(kind);
        this.reset();
    }

    reset() {
        this.view = { x: 0, y: 0, size: classCount };
        this.paint();
    }

    zoom(factor, at = null) {
        const { view } = this;
        const size = clamp(view.size * factor, Math.min(classCount, 4), classCount);
        const centre =
            at ??
            (this.cell ? [this.cell[1] + 0.5, this.cell[0] + 0.5] : [view.x + view.size / 2, view.y + view.size / 2]);
        const share = [(centre[0] - view.x) / view.size, (centre[1] - view.y) / view.size].map((value) =>
            clamp(value, 0, 1),
        );
        view.size = size;
        this.move(centre[0] - share[0] * size, centre[1] - share[1] * size);
    }

    move(x, y) {
        const most = classCount - this.view.size;
        Object.assign(this.view, { x: clamp(x, 0, most), y: clamp(y, 0, most) });
        this.draw();
    }

    /** The next most frequent error, wherever it is in this order. */
    jump(step) {
        const pairs = errorPairs(current);
        if (!pairs.length) return;
        const { truth, guess } = pairs[(this.nextError + pairs.length) % pairs.length];
        this.nextError = (this.nextError + step + pairs.length) % pairs.length;
        this.choose([this.order.indexOf(truth), this.order.indexOf(guess)], true);
    }

    choose(cell, scroll) {
        this.cell = cell;
        if (cell && scroll) {
            const { view } = this;
            const into = (start, place) =>
                place < start ? place : place + 1 > start + view.size ? place + 1 - view.size : start;
            this.move(into(view.x, cell[1]), into(view.y, cell[0]));
        } else this.draw();
        this.info.replaceChildren(...(cell ? this.words(cell) : [" "]));
        if (scroll) announce(this.info.textContent);
    }

    words([row, column]) {
        const [truth, guess] = [this.order[row], this.order[column]];
        const { counts, videos } = confusion(current);
        const found = counts[truth * classCount + guess];
        const share = videos[truth] ? ` (${percent(found / videos[truth])} of ${videos[truth]})` : "";
        return [
            named(className(truth)),
            truth === guess ? " recognised: " : " mistaken for ",
            ...(truth === guess ? [] : [named(className(guess)), ": "]),
            `${found}${share}`,
        ];
    }

    open() {
        const [row, column] = this.cell;
        this.onopen(this.order[row], this.order[column]);
    }

    /** Pixels of a cell. */
    get scale() {
        return this.side / this.view.size;
    }

    at(event) {
        const box = this.canvas.getBoundingClientRect();
        return [
            this.view.x + (event.clientX - box.left - this.gutter) / this.scale,
            this.view.y + (event.clientY - box.top - this.gutter) / this.scale,
        ];
    }

    cellAt(event) {
        const [x, y] = this.at(event).map(Math.floor);
        const inside = (value, start) =>
            value >= Math.floor(start) && value < Math.min(classCount, start + this.view.size);
        return inside(x, this.view.x) && inside(y, this.view.y) ? [y, x] : null;
    }

    /** Draw one pixel per cell in the current order and colours; kept until either changes. */
    paint() {
        const style = getComputedStyle(this.canvas);
        const colours = ["--cell", "--cell-right", "--cell-wrong"].map((name) =>
            style.getPropertyValue(name).trim().split(/\s+/).map(Number),
        );
        const { counts, videos } = confusion(current);
        const most = counts.reduce((a, b) => Math.max(a, b), 1);
        const picture = new ImageData(classCount, classCount);
        for (let row = 0; row < classCount; row += 1) {
            const truth = this.order[row];
            for (let column = 0; column < classCount; column += 1) {
                const found = counts[truth * classCount + this.order[column]];
                // The square root keeps errors of a few per cent visible next to a diagonal near one.
                const depth =
                    found === 0 ? 0 : 0.12 + 0.88 * Math.sqrt(this.shares ? found / videos[truth] : found / most);
                const full = colours[row === column ? 1 : 2];
                const at = 4 * (row * classCount + column);
                for (let part = 0; part < 3; part += 1)
                    picture.data[at + part] = colours[0][part] + depth * (full[part] - colours[0][part]);
                picture.data[at + 3] = 255;
            }
        }
        this.picture = document.createElement("canvas");
        this.picture.width = this.picture.height = classCount;
        this.picture.getContext("2d").putImageData(picture, 0, 0);
        this.draw();
    }

    draw() {
        const { canvas, view } = this;
        const wide = canvas.clientWidth;
        if (!wide || !this.picture) return;
        const ratio = devicePixelRatio || 1;
        const gutter = (wide - GUTTER) / view.size >= NAMES_FROM ? Math.min(GUTTER, wide * 0.3) : 18;
        this.gutter = gutter;
        this.side = wide - gutter - 1;
        if (canvas.width !== Math.round(wide * ratio)) canvas.width = canvas.height = Math.round(wide * ratio);
        const context = canvas.getContext("2d");
        const style = getComputedStyle(canvas);
        context.setTransform(ratio, 0, 0, ratio, 0, 0);
        context.clearRect(0, 0, wide, wide);
        context.imageSmoothingEnabled = this.scale < 1;
        context.save();
        context.beginPath();
        context.rect(gutter, gutter, this.side, this.side);
        context.clip();
        context.drawImage(
            this.picture,
            gutter - view.x * this.scale,
            gutter - view.y * this.scale,
            classCount * this.scale,
            classCount * this.scale,
        );
        if (this.scale >= COUNTS_FROM) this.drawCounts(context, style);
        if (this.cell) this.drawCross(context, style);
        context.restore();
        context.fillStyle = style.getPropertyValue("--muted");
        context.font = `12px ${style.fontFamily}`;
        this.drawNames(context);
    }

    place(index, start) {
        return this.gutter + (index - start) * this.scale;
    }

    visible(start) {
        const [first, last] = [Math.floor(start), Math.min(classCount, Math.ceil(start + this.view.size))];
        return [...Array(last - first).keys()].map((offset) => first + offset);
    }

    drawCounts(context, style) {
        const { counts, videos } = confusion(current);
        context.font = `${Math.min(14, this.scale * 0.42)}px ${style.fontFamily}`;
        context.textAlign = "center";
        context.textBaseline = "middle";
        for (const row of this.visible(this.view.y)) {
            for (const column of this.visible(this.view.x)) {
                const truth = this.order[row];
                const found = counts[truth * classCount + this.order[column]];
                if (!found) continue;
                const dark = this.shares ? found / videos[truth] > 0.3 : false;
                context.fillStyle = style.getPropertyValue(dark ? "--on-cell" : "--text");
                context.fillText(
                    String(found),
                    this.place(column + 0.5, this.view.x),
                    this.place(row + 0.5, this.view.y),
                );
            }
        }
    }

    drawCross(context, style) {
        const [row, column] = this.cell;
        const [x, y] = [this.place(column, this.view.x), this.place(row, this.view.y)];
        context.strokeStyle = style.getPropertyValue("--accent");
        context.globalAlpha = 0.25;
        context.strokeRect(this.gutter, y, this.side, this.scale);
        context.strokeRect(x, this.gutter, this.scale, this.side);
        context.globalAlpha = 1;
        context.lineWidth = 2;
        context.strokeRect(x - 1, y - 1, this.scale + 2, this.scale + 2);
        context.lineWidth = 1;
    }

    drawNames(context) {
        context.textBaseline = "middle";
        if (this.scale < NAMES_FROM) {
            context.textAlign = "left";
            context.fillText("predicted →", this.gutter, this.gutter / 2);
            context.save();
            context.rotate(-Math.PI / 2);
            context.textAlign = "right";
            context.fillText("← true", -this.gutter, this.gutter / 2);
            context.restore();
            return;
        }
        context.textAlign = "right";
        for (const row of this.visible(this.view.y)) this.drawName(context, row, 0, this.place(row + 0.5, this.view.y));
        context.save();
        context.rotate(-Math.PI / 2);
        context.textAlign = "left";
        for (const column of this.visible(this.view.x))
            this.drawName(context, column, 1, this.place(column + 0.5, this.view.x));
        context.restore();
    }

    drawName(context, index, isColumn, middle) {
        if (middle < this.gutter || middle > this.gutter + this.side) return;
        const text = cut(className(this.order[index]), context, this.gutter - 10);
        context.fillText(text, isColumn ? -this.gutter + 5 : this.gutter - 5, middle);
    }
}

const clamp = (value, low, high) => Math.max(low, Math.min(high, value));

function cut(text, context, room) {
    if (context.measureText(text).width <= room) return text;
    let end = Math.min(text.length, 60);
    while (end > 1 && context.measureText(`${text.slice(0, end)}…`).width > room) end -= 1;
    return `${text.slice(0, end)}…`;
}
