// The page's data: one JSON block for the whole page, one with typed arrays for each experiment, and the video names in
// pieces, each parsed when one of its names is first shown.

const UNREAD = 0xffff; // the video could not be read: nothing was predicted
const ABSENT = 0xfffe; // this experiment was not evaluated on the video

const block = (id) => JSON.parse(document.getElementById(id).textContent);
const report = block("report-data");
const classCount = report.classes.length;
const videoCount = report.videos;
const labels = words(report.labels);

let current = 0; // the experiment whose predictions are shown

/** Base64 of little-endian 16-bit numbers. */
function words(text) {
    const binary = atob(text);
    const bytes = new Uint8Array(binary.length);
    for (let i = 0; i < binary.length; i += 1) bytes[i] = binary.charCodeAt(i);
    return new Uint16Array(bytes.buffer);
}

function once(make) {
    const kept = new Map();
    return (key) => {
        if (!kept.has(key)) kept.set(key, make(key));
        return kept.get(key);
    };
}

/** guess and score (N x k, best first), own (score of the true class) and rank (of the true class, 0 = best). */
const experiment = once((index) => {
    const raw = block(`experiment-${index}`);
    return {
        ...report.experiments[index],
        ...Object.fromEntries(["guess", "score", "own", "rank"].map((key) => [key, words(raw[key])])),
    };
});

const names = once((piece) => block(`names-${piece}`));
const videoName = (row) => names(Math.floor(row / report.piece))[row % report.piece];
/** The fold in which the first experiment held a video out; "" without folds. */
function foldNote(row) {
    let end = 0;
    for (const [fold, videos] of report.folds) if (row < (end += videos)) return ` · fold ${fold}`;
    return "";
}

const className = (index) => report.classes[index];
const guessOf = (row, index = current) => experiment(index).guess[row * report.top];
const confidence = (row, index = current) => experiment(index).score[row * report.top] / 65535;
const isSeen = (row, index = current) => guessOf(row, index) !== ABSENT;
const isRight = (row, index = current) => guessOf(row, index) === labels[row];
const isWrong = (row, index = current) => !isRight(row, index) && isSeen(row, index);
const allowedPairs = new Set(report.allowed.map(([truth, guess]) => truth * classCount + guess));
const isAllowed = (truth, guess) => allowedPairs.has(truth * classCount + guess);

/** The confusion counts of one experiment (K x K, rows true) and its number of videos per class. */
const confusion = once((index) => {
    const counts = new Uint32Array(classCount * classCount);
    const videos = new Uint32Array(classCount);
    for (let row = 0; row < videoCount; row += 1) {
        const guess = guessOf(row, index);
        if (guess === ABSENT) continue;
        videos[labels[row]] += 1;
        if (guess !== UNREAD) counts[labels[row] * classCount + guess] += 1;
    }
    return { counts, videos };
});

/** Pairs of different classes that were confused, most frequent first: [{truth, guess, count}]. */
const errorPairs = once((index) => {
    const { counts } = confusion(index);
    const pairs = [];
    for (let truth = 0; truth < classCount; truth += 1) {
        for (let guess = 0; guess < classCount; guess += 1) {
            const found = counts[truth * classCount + guess];
            if (truth !== guess && found > 0 && !isAllowed(truth, guess)) pairs.push({ truth, guess, count: found });
        }
    }
    return pairs.sort((a, b) => b.count - a.count);
});

/** Rows for which `wanted` holds; most confident first unless `by` gives another key. */
function rowsWhere(wanted, by = (row) => -confidence(row)) {
    const rows = [];
    for (let row = 0; row < videoCount; row += 1) if (wanted(row)) rows.push(row);
    const keys = new Map(rows.map((row) => [row, by(row)]));
    return rows.sort((a, b) => keys.get(a) - keys.get(b) || a - b);
}

/** The most confident mistakes, without those that an allowed pair excuses. */
const worstVideos = (index) =>
    rowsWhere(
        (row) => isWrong(row, index) && guessOf(row, index) !== UNREAD && !isAllowed(labels[row], guessOf(row, index)),
        (row) => -confidence(row, index),
    ).slice(0, report.listed);
