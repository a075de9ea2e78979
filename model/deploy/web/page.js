// Classifies images with onnxruntime-web. An image is prepared as in validation (utils/data/transform.py): turned as EXIF
// says, resized with antialiasing, its centre cut out, and normalised.

import * as ort from "./ort.wasm.min.mjs";

const known = JSON.parse(document.getElementById("network").textContent);
const { height, width, channels, mean, std, resize_ratio: ratio, ignore_orientation: stored } = known.images;
const SHOWN = 5;
const WARM_UP = 10; // the engine's code is compiled again while it runs: the first runs are slow
const SLENDER = 16;

/** Half to even, as Python rounds. */
function rounded(value) {
  const below = Math.floor(value);
  if (value - below !== 0.5) return Math.round(value);
  return below % 2 === 0 ? below : below + 1;
}

/** For each of `to` places the first of `from` samples that it sees, and their weights: a triangle of the scale's width. */
function triangle(from, to) {
  const scale = from / to;
  const reach = Math.max(scale, 1);
  return Array.from({ length: to }, (_, place) => {
    const centre = (place + 0.5) * scale;
    const first = Math.max(Math.floor(centre - reach + 0.5), 0);
    const last = Math.min(Math.floor(centre + reach + 0.5), from);
    const weights = [];
    for (let i = first; i < last; i++) weights.push(Math.max(0, 1 - Math.abs((i - centre + 0.5) / reach)));
    const total = weights.reduce((sum, weight) => sum + weight, 0);
    return { first, weights: weights.map((weight) => weight / total) };
  });
}

/** Weights as whole numbers below 2 ** 15, with as many binary places as fit: torch resizes bytes so. */
function wholeWeights(places) {
  const most = Math.max(...places.flatMap(({ weights }) => weights));
  let binary = 0;
  while (binary < 22 && Math.floor(0.5 + most * 2 ** (binary + 1)) < 2 ** 15) binary++;
  const scale = 2 ** binary;
  for (const place of places) place.weights = place.weights.map((weight) => Math.floor(0.5 + weight * scale));
  return (sum) => Math.min(255, Math.floor((sum + scale / 2) / scale));
}

/** Resizes rows of `planes` values; `bytes` rounds to bytes after each direction. */
function resize(image, high, wide, bytes) {
  const along = (from, to) => {
    const places = triangle(from, to);
    return [places, bytes ? wholeWeights(places) : (value) => value];
  };
  const { planes } = image;
  let { data, height: rows, width: columns } = image;
  if (wide !== columns) {
    const out = new Float32Array(rows * wide * planes);
    const [places, finish] = along(columns, wide);
    places.forEach(({ first, weights }, x) => {
      for (let y = 0; y < rows; y++) {
        for (let c = 0; c < planes; c++) {
          let sum = 0;
          weights.forEach((weight, i) => { sum += weight * data[(y * columns + first + i) * planes + c]; });
          out[(y * wide + x) * planes + c] = finish(sum);
        }
      }
    });
    data = out;
    columns = wide;
  }
  if (high !== rows) {
    const out = new Float32Array(high * columns * planes);
    const row = columns * planes;
    const [places, finish] = along(rows, high);
    places.forEach(({ first, weights }, y) => {
      for (let x = 0; x < row; x++) {
        let sum = 0;
        weights.forEach((weight, i) => { sum += weight * data[(first + i) * row + x]; });
        out[y * row + x] = finish(sum);
      }
    });
    data = out;
    rows = high;
  }
  return { data, height: rows, width: columns, planes };
}

function cropped(image, top, left, high, wide) {
  const { data, width: columns, planes } = image;
  const out = new Float32Array(high * wide * planes);
  for (let y = 0; y < high; y++) {
    const begin = ((top + y) * columns + left) * planes;
    out.set(data.subarray(begin, begin + wide * planes), y * wide * planes);
  }
  return { data: out, height: high, width: wide, planes };
}

/** The image resized until it covers `ratio` of the network's size, and its centre. */
function centre(image) {
  for (const [side, other, to, across] of [["height", "width", height, width], ["width", "height", width, height]]) {
    const beyond = image[side] - Math.ceil((SLENDER * image[other] * to) / across);
    if (beyond <= 0) continue;
    const begin = Math.floor(beyond / 2);
    image = side === "height"
      ? cropped(image, begin, 0, image.height - beyond, image.width)
      : cropped(image, 0, begin, image.height, image.width - beyond);
  }
  const [wanted, shorter] =
    image.height * width <= image.width * height ? [height, image.height] : [width, image.width];
  const scaled = (side, least) => Math.max(Math.floor((rounded(wanted * ratio) * side) / shorter), least);
  const [high, wide] = [scaled(image.height, height), scaled(image.width, width)];
  const resized = resize(image, high, wide, true);
  return cropped(resized, rounded((high - height) / 2), rounded((wide - width) / 2), height, width);
}

/** ITU-R BT.601's luma, as utils/data/grey.py computes it. */
function grey(image, bytes) {
  const pixels = image.height * image.width;
  const out = new Float32Array(pixels);
  for (let i = 0; i < pixels; i++) {
    const value = (19595 * image.data[3 * i] + 38470 * image.data[3 * i + 1] + 7471 * image.data[3 * i + 2]) / 65536;
    out[i] = bytes ? Math.floor(value + 0.5) : value;
  }
  return { ...image, data: out, planes: 1 };
}

/** RGBA bytes of any size to an image of the network's size and channels, values 0 to 255. */
function prepared({ data, height: high, width: wide }) {
  const colours = new Float32Array(high * wide * 3);
  for (let i = 0; i < high * wide; i++) for (let c = 0; c < 3; c++) colours[3 * i + c] = data[4 * i + c];
  let image = { data: colours, height: high, width: wide, planes: 3 };
  const whole = ratio === null;
  image = whole ? resize(image, height, width, false) : centre(image);
  return channels === 1 ? grey(image, !whole || (high === height && wide === width)) : image;
}

/** The network's input: [1, channels, height, width], normalised. */
function tensor(image) {
  const pixels = height * width;
  const values = new Float32Array(channels * pixels);
  for (let c = 0; c < channels; c++) {
    for (let i = 0; i < pixels; i++) values[c * pixels + i] = (image.data[i * channels + c] / 255 - mean[c]) / std[c];
  }
  return new ort.Tensor("float32", values, [1, channels, height, width]);
}

function softmax(logits) {
  const most = Math.max(...logits);
  const powers = Array.from(logits, (logit) => Math.exp(logit - most));
  const total = powers.reduce((sum, power) => sum + power, 0);
  return powers.map((power) => power / total);
}

const element = (name) => document.getElementById(name);
const say = (text) => { element("status").textContent = text; };

function show(image, probabilities, milliseconds) {
  const pixels = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    for (let c = 0; c < 3; c++) pixels.data[4 * i + c] = image.data[i * channels + (channels === 1 ? 0 : c)];
    pixels.data[4 * i + 3] = 255;
  }
  Object.assign(element("seen"), { width, height });
  element("seen").getContext("2d").putImageData(pixels, 0, 0);
  const order = probabilities.map((_, i) => i).sort((a, b) => probabilities[b] - probabilities[a]);
  element("classes").replaceChildren(...order.slice(0, SHOWN).map((i) => {
    const item = document.createElement("li");
    const [name, share, bar] = ["span", "b", "meter"].map((kind) => document.createElement(kind));
    name.textContent = known.classes[i];
    share.textContent = `${(100 * probabilities[i]).toFixed(2)} %`;
    bar.value = probabilities[i];
    item.append(name, share, bar);
    return item;
  }));
  element("time").textContent = `${milliseconds.toFixed(2)} ms for the network`;
}

/** Classifies RGBA bytes; the last answer is kept for whoever drives this page. */
let waiting = Promise.resolve();
function classify(pixels) {
  waiting = waiting.then(async () => {
    const image = prepared(pixels);
    const input = tensor(image);
    const began = performance.now();
    const { logits } = await session.run({ input });
    const milliseconds = performance.now() - began;
    const probabilities = softmax(logits.data);
    show(image, probabilities, milliseconds);
    window.answer = { input: Array.from(input.data), logits: Array.from(logits.data), probabilities, milliseconds };
    return window.answer;
  });
  return waiting;
}

async function classifyFile(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, {
      colorSpaceConversion: "none", premultiplyAlpha: "none", imageOrientation: stored ? "none" : "from-image",
    });
  } catch (error) {
    say(`${file.name}: not an image that this browser can read`);
    return null;
  }
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d");
  context.drawImage(bitmap, 0, 0);
  say(`${file.name}, ${bitmap.width} x ${bitmap.height}`);
  return classify(context.getImageData(0, 0, bitmap.width, bitmap.height));
}

// The drawing area -----------------------------------------------------------------------------------

const pad = element("pad").getContext("2d", { willReadFrequently: true });

function clear() {
  pad.fillStyle = element("dark").checked ? "#fff" : "#000";
  pad.fillRect(0, 0, 224, 224);
}

function draw(event) {
  if (event.buttons === 0) return;
  const box = element("pad").getBoundingClientRect();
  const at = (x, y) => [((x - box.left) * 224) / box.width, ((y - box.top) * 224) / box.height];
  pad.strokeStyle = element("dark").checked ? "#000" : "#fff";
  pad.lineWidth = 24;
  pad.lineCap = "round";
  pad.beginPath();
  pad.moveTo(...at(event.clientX - event.movementX, event.clientY - event.movementY));
  pad.lineTo(...at(event.clientX, event.clientY));
  pad.stroke();
}

// Beginning ------------------------------------------------------------------------------------------

document.querySelector("h1").textContent = known.title;
document.title = known.title;
clear();
ort.env.wasm.numThreads = 1;
let session;
try {
  session = await ort.InferenceSession.create(known.network, { executionProviders: ["wasm"] });
  const nothing = tensor({ data: new Float32Array(height * width * channels) });
  for (let i = 0; i < WARM_UP; i++) await session.run({ input: nothing });
  say("ready");
} catch (error) {
  say(`the network cannot be loaded: ${error.message}`);
  throw error;
}

element("file").addEventListener("change", (event) => event.target.files.length && classifyFile(event.target.files[0]));
element("drop").addEventListener("keydown", (event) => event.key === "Enter" && element("file").click());
element("drop").addEventListener("dragover", (event) => { event.preventDefault(); element("drop").classList.add("over"); });
element("drop").addEventListener("dragleave", () => element("drop").classList.remove("over"));
element("drop").addEventListener("drop", (event) => {
  event.preventDefault();
  element("drop").classList.remove("over");
  if (event.dataTransfer.files.length) classifyFile(event.dataTransfer.files[0]);
});
element("pad").addEventListener("pointerdown", (event) => event.target.setPointerCapture(event.pointerId));
element("pad").addEventListener("pointermove", draw);
element("pad").addEventListener("pointerup", () => classify(pad.getImageData(0, 0, 224, 224)));
element("clear").addEventListener("click", clear);
element("dark").addEventListener("change", clear);
Object.assign(window, { classify, classifyFile, ready: true });
