// Videos as cards: what the model saw, what it predicted, and the clip, which is loaded on request.

/** One video. */
function card(row) {
    const media = report.media[row];
    return h(
        "article",
        { class: `card ${isRight(row) ? "is-right" : "is-wrong"}`, "data-row": row },
        media ? pictures(row, media) : null,
        h("p", { class: "path" }, named(videoName(row)), foldNote(row)),
        verdict(row),
    );
}

/** The frames of one view as a contact sheet, and a button for the clip. Choosing a frame shows it in the clip. */
function pictures(row, media) {
    const { frames, columns } = media;
    const rows = Math.ceil(frames.length / columns);
    const text = `What the model saw: frames ${frames.join(", ")}${media.of > frames.length ? ` of ${media.of}` : ""}`;
    const sheet = h("img", {
        class: "sheet",
        decoding: "async",
        alt: text,
        title: text,
        width: media.width,
        height: media.height,
    });
    loadWhenNear(sheet, media.sheet);
    const place = h("div", { class: "clip" });
    const maps = mapButtons(sheet, media);
    if (!media.clip) return [sheet, maps];
    const play = (at) => {
        let video = place.querySelector("video");
        if (!video) {
            video = h("video", {
                controls: true,
                loop: true,
                playsinline: true,
                preload: "none",
                src: media.clip,
                "aria-label": `clip of ${videoName(row)}`,
            });
            video.muted = true;
            video.addEventListener("error", () =>
                place.replaceChildren(h("p", { class: "note" }, "This browser cannot play the clip.")),
            );
            place.replaceChildren(video);
            button.hidden = true; // the clip has its own controls
        }
        if (at === null)
            video.play().catch(() => {}); // if the browser requires a click, the controls are there
        else showAt(video, at);
    };
    sheet.classList.add("can-play");
    sheet.addEventListener("click", (event) => {
        const box = sheet.getBoundingClientRect();
        const among = (at, size, parts) => clamp(Math.floor((at / size) * parts), 0, parts - 1);
        const column = among(event.clientX - box.left, box.width, columns);
        const tile = among(event.clientY - box.top, box.height, rows) * columns + column;
        const own = maps?.dataset.frames ?? "own"; // another experiment may have seen other frames
        play(own === "own" ? media.times[Math.min(tile, frames.length - 1)] : null);
    });
    const part = media.part ? ` (${media.part})` : "";
    const button = h("button", { type: "button", class: "play", onclick: () => play(null) }, `▶ play clip${part}`);
    return [sheet, maps, place, button];
}

/** Buttons that show where the current experiment's network looked, in place of the frames; null without maps. */
function mapButtons(sheet, media) {
    const maps = media.maps?.[current];
    if (!maps) return null;
    const plain = { text: "frames", src: media.sheet, width: media.width, height: media.height };
    const choices = [
        plain,
        ...maps.shown.map(([index, src]) => ({
            text: index < 0 ? "where it looked" : ["for ", named(className(index))],
            src,
            width: maps.width,
            height: maps.height,
        })),
    ];
    const buttons = choices.map((choice) =>
        h(
            "button",
            { type: "button", "aria-pressed": choice === plain ? "true" : "false", onclick: () => show(choice) },
            choice.text,
        ),
    );
    function show(choice) {
        near.unobserve(sheet); // if it was not near yet, it must not replace the choice later
        for (const key of ["width", "height", "src"]) sheet.setAttribute(key, choice[key]);
        sheet.alt = choice === plain ? sheet.title : `Where the network looked: frames ${maps.frames.join(", ")}`;
        buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(choices[i] === choice)));
        place.dataset.frames = choice === plain || String(maps.frames) === String(media.frames) ? "own" : "other";
    }
    const place = h("p", { class: "maps group" }, buttons);
    return place;
}

// Browsers ignore loading="lazy" for pages that are opened from disk.
const near = new IntersectionObserver(
    (entries) => {
        for (const { target } of entries.filter((entry) => entry.isIntersecting)) {
            near.unobserve(target);
            target.src = waiting.get(target);
        }
    },
    { rootMargin: "400px" },
);
const waiting = new WeakMap();

/** Load a picture when it is about to be seen. */
function loadWhenNear(image, address) {
    waiting.set(image, address);
    near.observe(image);
}

function showAt(video, seconds) {
    const jump = () => {
        video.pause();
        video.currentTime = seconds;
    };
    if (video.readyState > 0) jump();
    else {
        video.addEventListener("loadedmetadata", jump, { once: true });
        video.preload = "auto";
        video.load();
    }
}

/** Truth and the best guesses with their scores. */
function verdict(row) {
    if (!isSeen(row)) return h("p", { class: "note" }, "not among the videos of this experiment");
    const truth = labels[row];
    if (guessOf(row) === UNREAD) {
        return [
            h("p", { class: "truth" }, "true: ", named(className(truth))),
            h("p", { class: "note" }, "could not be read: counts as wrong"),
        ];
    }
    const data = experiment(current);
    const best = [...Array(report.top).keys()].map((place) => row * report.top + place);
    const lines = best.map((at) => guessLine(data.guess[at], data.score[at] / 65535, truth));
    if (!best.some((at) => data.guess[at] === truth)) {
        lines.push(guessLine(truth, data.own[row] / 65535, truth, `rank ${data.rank[row] + 1}`));
    }
    const predicted = named(className(guessOf(row)));
    return [
        h("p", { class: "truth" }, "true: ", named(className(truth)), ", predicted: ", predicted),
        h("ol", { class: "guesses" }, lines),
    ];
}

function guessLine(index, score, truth, note = "") {
    const kind = index === truth ? "right" : isAllowed(truth, index) ? "allowed" : "wrong";
    return h(
        "li",
        { class: kind },
        h("span", { class: "name" }, named(className(index)), note && ` ${note}`),
        bar(score, kind),
        h("span", { class: "number" }, percent(score)),
    );
}

/** Cards for many rows, some at a time. */
function cards(rows, { page: size = 24, empty = "No video." } = {}) {
    let shown = 0;
    const list = h("div", { class: "cards" });
    const more = h("button", { type: "button", class: "more", onclick: () => draw() });
    function draw() {
        list.append(...rows.slice(shown, shown + size).map(card));
        shown = Math.min(rows.length, shown + size);
        more.hidden = shown >= rows.length;
        more.textContent = count(rows.length - shown, "more video");
    }
    draw();
    return h("div", {}, rows.length ? list : h("p", { class: "note" }, empty), more);
}

/** A link to the list of videos of a class or a pair. */
function linkToVideos(wanted, ...text) {
    return h("a", { href: `#videos?${new URLSearchParams(wanted)}` }, text);
}
