// The interactive figures of the kit, in one ES module without a build step or a network: the same file is used as an
// anywidget in JupyterLab, Colab and Voila, and inlined in the offline console. `spec.kind` of a model is the name of a
// function in KINDS, which puts a demo into an element. Only `frames` and `latency` send messages to the kernel.

const BLUE = "#0072b2", RED = "#d55e00", GREEN = "#00704f", INK = "#1a1a1a", GREY = "#6e6e6e", PALE = "#9a9a9a";
const COLORS = [BLUE, RED, GREEN]; // of arms, with DASHES beside them
const CIVIDIS = ["#00224e", "#35456c", "#666970", "#948e77", "#c8b866"]; // without its end, too light on white
const DASHES = ["", "16 9", "3 7"];
const FPS = 30, FILM_MS = 4000, FRAME_MS = 500; // length of a smooth film; time of one frame in other films
const PINGS = 20, PAUSE_MS = 50; // pause before a frame is requested in advance: the next key press has priority

const CSS = `
.dk { font: 14px/1.3 sans-serif; color: ${INK}; background: #fff; padding: 2px }
.dk button, .dk select { font: inherit; color: inherit; background: #fff; border: 1px solid ${GREY}; border-radius: 5px;
  padding: .15em .5em; cursor: pointer; max-width: 100% }
.dk button[aria-pressed=true], .dk button[aria-current=true] { background: ${BLUE}; border-color: ${BLUE}; color: #fff }
.dk button:disabled { opacity: .4; cursor: default }
.dk :focus-visible { outline: 3px solid ${RED}; outline-offset: 1px }
.dk .controls { display: flex; flex-wrap: wrap; gap: .3em 1.2em; align-items: center; margin-bottom: .3em }
.dk label { display: flex; gap: .5em; align-items: center; max-width: 100% }
.dk output { font-weight: bold } .dk input[type=range] { width: 9em; min-width: 4em; margin: 0; accent-color: ${BLUE} }
.dk .picture[aria-busy=true] { opacity: .6 } .dk .picture img { max-width: 100% } .dk figure { margin: 0 }
.dk .panels { display: flex; flex-wrap: wrap; justify-content: center; gap: .2em 1em }
.dk .panel { min-width: 0; text-align: center }
.dk .panel svg { display: block; width: 100%; max-height: 60vh; font: 24px sans-serif; overflow: visible }
.dk .point { cursor: grab; touch-action: none } .dk .pad { cursor: crosshair; touch-action: none }
.dk .rows { display: grid; gap: .2em; max-width: 62em }
.dk .rows.pair { grid-template-columns: 1fr 1fr; gap: .2em 2em; text-align: center }
.dk .rows img { width: 100%; max-height: 24vh; object-fit: contain; object-position: left; image-rendering: pixelated }
.dk .rows.pair img { max-height: 48vh; object-position: center }
.dk .beside { display: flex; flex-wrap: wrap; gap: .5em 2em; align-items: start } .dk .beside .picture { flex: 1 20em }
.dk table { border-collapse: collapse; width: auto; margin: 0; font-size: inherit }
.dk td, .dk th { padding: 1px; font-weight: normal; text-align: center }
.dk td button { width: min(4em, 14vw); padding: .4em 0; border: 3px solid transparent; border-radius: 0 }
.dk td button[aria-pressed=true] { border-color: ${RED} }
.dk .near { display: grid; grid-template-columns: repeat(auto-fill, minmax(4em, 7em)); gap: .4em }
.dk .mark { position: absolute; outline: 4px solid ${RED} }
.dk .tiles { display: grid; grid-template-columns: auto repeat(6, minmax(.8em, 4.2em) 1.1em); gap: .15em .1em }
.dk .tile { aspect-ratio: 1; image-rendering: pixelated; position: relative } .dk .tiles span { align-self: center }
.dk .fault { color: #a00; white-space: pre-wrap }
.dk nav { display: flex; flex-wrap: wrap; gap: .3em; margin-bottom: .3em }
.dk.lecture { font-size: 22px; line-height: 1.25 }
.dk.lecture h2 { font-size: 1.25em; margin: .1em 0 0 } .dk.lecture p { margin: 0 0 .2em }
.dk.lecture nav button { flex: auto; font-size: .91em; padding: .1em } .dk.lecture button { border-width: 2px }
.dk.lecture input[type=range] { height: 1.4em } .dk.lecture .rows { max-width: none }
.dk.lecture .rows:not(.pair) img { max-height: 30vh } .dk.lecture .controls { gap: .3em .8em }
@media (min-width: 900px) {
  .dk.lecture { display: flex; flex-direction: column; height: calc(100vh - 24px) }
  .dk.lecture :is(section:not([hidden]), .picture) { flex: 1; min-height: 0; display: flex; flex-direction: column }
  .dk.lecture .picture > .panels { flex: 1 1 0; min-height: 0; flex-wrap: nowrap }
  .dk.lecture .panel { display: flex; flex-direction: column }
  .dk.lecture .panel svg { flex: 1; min-height: 0; max-height: none }
}
`;

const KINDS = { frames, playground, trajectories, train, map, patch, quiz, latency, console: lecture };

export default { render };

export function render({ model, el }) {
  el.append(element("style", {}, CSS));
  const root = element("div", { class: "dk" });
  el.append(root);
  if (el !== document.body) root.addEventListener("keydown", event => event.stopPropagation()); // Lab has shortcuts
  const listeners = [], heard = message => listeners.forEach(listener => listener(message));
  model.on("msg:custom", heard);
  const spec = model.get("spec");
  KINDS[spec.kind](root, spec, { ask: message => model.send(message), hear: listener => listeners.push(listener) });
  return () => model.off("msg:custom", heard);
}

// ---- elements, controls, time

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function button(words, pressed) {
  const made = element("button", { type: "button" }, words);
  made.addEventListener("click", pressed);
  return made;
}

/** A menu for words, a slider over the list for numbers; `changed` is called with the control. */
function control(name, values, index, changed) {
  const menu = values.some(value => Number.isNaN(Number(value))), last = values.length - 1;
  const readout = element("output", { "aria-live": "off" }); // else each frame of a film would be spoken
  const input = menu ? element("select", { "aria-label": name }, ...values.map(value => element("option", {}, value)))
    : element("input", { type: "range", min: 0, max: last, step: 1, "aria-label": name });
  if (!menu) input.style.width = `${clamp(values.length / 4, 6, 16)}em`;
  readout.style.minWidth = `${Math.max(...values.map(value => String(value).length))}ch`;
  const made = {
    node: element("label", {}, name, input, ...(menu ? [] : [readout])),
    last,
    get value() { return values[made.index]; },
    get index() { return menu ? input.selectedIndex : Number(input.value); },
    set index(i) { // does not call `changed`
      input[menu ? "selectedIndex" : "value"] = i;
      readout.textContent = values[i];
      if (!menu) input.setAttribute("aria-valuetext", values[i]);
    },
    move(i) { made.index = i; changed(made); },
  };
  made.index = index;
  input.addEventListener("input", () => made.move(made.index));
  return made;
}

/** Puts a row of controls over the lists of `choices`, which begin at the indices `start`, and a picture into `root`;
 * `changed` gets the name of what was moved. `place()` gives the indices, and `value(name)` the chosen value. */
function stage(root, choices, start, changed) {
  const made = {}, row = element("div", { class: "controls" }), picture = element("div", { class: "picture" });
  Object.entries(choices).forEach(([name, values], k) => {
    made[name] = control(name, values, start[k], () => changed(name));
    row.append(made[name].node);
  });
  root.append(row, picture);
  const place = () => Object.values(made).map(one => one.index);
  return { made, row, picture, place, value: name => made[name].value };
}

/** Buttons: `play` calls `frame(ms since the last call)` 30 times a second until it gives false or the demo is hidden;
 * a step; and others. If the device is set to reduced motion, there is no `play`. */
function runner(frame, [stepName, step], others = {}, begin = () => {}) {
  let timer = 0, before = 0;
  const play = button("play", () => (timer ? stop() : run(before = performance.now(), begin())));
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;

  function run(now) {
    timer = requestAnimationFrame(run);
    play.textContent = "pause";
    const passed = now - before;
    if (passed < 1000 / FPS - 4) return;
    before = now;
    if (!play.offsetParent || frame(passed) === false) stop();
  }

  function stop() {
    cancelAnimationFrame(timer);
    timer = 0;
    play.textContent = "play";
  }

  const stepped = button(stepName, () => { stop(); step(); });
  return { stop, buttons: [...(calm ? [] : [play]), stepped, ...Object.entries(others).map(one => button(...one))] };
}

/** The same buttons for a control whose axis is time. `ready` tells whether the current frame is drawn; `between`, if
 * given, draws an index that is not an integer, so that a film is smooth. */
function player(axis, { ready = () => true, between = null }) {
  let at = 0;
  const { stop, buttons } = runner(passed => {
    if (ready()) at += between ? passed * axis.last / FILM_MS : passed / FRAME_MS;
    const whole = Math.min(axis.last, Math.floor(at));
    if (whole !== axis.index) axis.move(whole);
    if (between && whole < axis.last) between(at);
    return whole < axis.last;
  }, ["step", () => axis.move((axis.index + 1) % (axis.last + 1))], {}, () => { at = axis.index % axis.last || 0; });
  axis.node.addEventListener("input", stop);
  return buttons;
}

const clamp = (x, low, high) => Math.max(low, Math.min(high, x));
const sum = values => values.reduce((total, value) => total + value, 0);

// ---- pictures: rows of panels, each an SVG with axes of its own under a title; their parts are strings

const ENTITIES = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" };
const escaped = text => String(text).replace(/[&<>"]/g, character => ENTITIES[character]);

/** Panels side by side, below each other where the page is narrow, with one alternative text. */
const strip = () => element("div", { class: "panels", role: "img" });
const paint = (node, alt, ...parts) => {
  node.setAttribute("aria-label", alt);
  node.innerHTML = parts.flat().join("");
};

const words = (x, y, text, anchor = "middle") =>
  `<text x="${x}" y="${y}" fill="${GREY}" text-anchor="${anchor}">${escaped(text)}</text>`;

const colored = (text, color) => `<b style="color: ${color}">${escaped(text)}</b>`;

/** Axes from x[0] to x[1] and y[0] to y[1] over width x height units, with a margin; points outside are drawn on the
 * edge. `svg(title, ...parts)` is the panel; the title is HTML. */
function panel({ x, y, width = 420, height = 420, left = 6, right = 6, below = 6 }) {
  const at = (v, [low, high], size) => size * clamp((v - low) / (high - low || 1), 0, 1);
  const pixel = p => [left + at(p[0], x, width), 6 + height - at(p[1], y, height)].map(v => v.toFixed(1));
  const full = left + width + right;
  return {
    pixel,
    style: `flex: ${full} 1 ${0.6 * full}px; max-width: ${1.4 * full}px`,
    open: `<svg viewBox="0 0 ${full} ${6 + height + below}" aria-hidden="true"><rect x="${left}" y="6" width="${width}"
      height="${height}" fill="none" stroke="${GREY}"/>`,
    svg(title, ...parts) {
      return `<figure class="panel" style="${this.style}"><figcaption>${title}</figcaption>${this.open}${
        parts.flat().join("")}</svg></figure>`;
    },
    under(event, canvas) { // where a pointer is
      const p = new DOMPoint(event.clientX, event.clientY).matrixTransform(canvas.getScreenCTM().inverse());
      return [x[0] + (p.x - left) / width * (x[1] - x[0]), y[1] - (p.y - 6) / height * (y[1] - y[0])]
        .map((v, k) => clamp(v, ...[x, y][k]));
    },
    dots: (points, color, size = 5, opacity = 0.7) => `<path d="${points.map(p => `M${pixel(p).join(" ")}h0`).join("")}"
      fill="none" stroke="${color}" stroke-width="${size}" stroke-linecap="round" opacity="${opacity}"/>`,
    line: (points, color, size = 3, dash = "") => `<polyline points="${points.map(p => pixel(p).join()).join(" ")}"
      fill="none" stroke="${color}" stroke-width="${size}" stroke-dasharray="${dash}"/>`,
    ways: (pairs, color) => `<path d="${pairs.map(([p, q]) => `M${pixel(p).join(" ")}L${pixel(q).join(" ")}`)
      .join("")}" fill="none" stroke="${color}" stroke-width="2" opacity=".5"/>`,
    across: (ticks, name) => ticks
      .map(([v, text]) => words(pixel([v, y[0]])[0], height + 32, text)).join("")
      + words(left + width / 2, height + 58, name),
    ends: texts => texts.map((text, k) => words(left - 8, k ? 24 : height + 4, text, "end")).join(""),
  };
}

// ---- frames that are drawn in advance, or by the kernel on request

function frames(root, spec, kernel) {
  const { made, row, picture, place } = stage(root, spec.controls, spec.start, show);
  const known = new Map(), here = () => place().join();
  let asked = "", shown = "";
  const shape = frame => (typeof frame === "string" ? html(frame) : rows(frame.rows, frame.alt));
  Object.entries(spec.frames).forEach(([key, frame]) => known.set(key, shape(frame)));
  if (spec.play) row.append(...player(made[spec.play], { ready: () => shown === here() }));

  async function show() {
    const key = here(), frame = known.get(key);
    picture.setAttribute("aria-busy", !frame);
    if (!frame) return ask(place());
    if (spec.asks) setTimeout(() => ask(neighbour()), PAUSE_MS);
    await Promise.all([...frame.querySelectorAll("img")].map(one => one.decode().catch(() => {}))); // no blank between
    if (key !== here() || key === shown) return;
    picture.replaceChildren(frame);
    shown = key;
  }

  function ask(wanted) { // one at a time: of the keys pressed meanwhile only the last counts
    if (asked || !wanted) return;
    asked = wanted.join();
    kernel.ask({ place: wanted });
  }

  /** A place one step away that is not drawn yet. It is requested after a pause: a key that is held down goes first. */
  function neighbour() {
    const near = place().flatMap((i, k) => [i + 1, i - 1].map(j => place().with(k, j))
      .filter(one => one[k] >= 0 && one[k] < Object.values(spec.controls)[k].length));
    return near.find(one => !known.has(one.join()));
  }

  kernel.hear(({ place: drawnAt, drawn, fault }) => {
    const key = drawnAt.join();
    known.set(key, fault ? element("pre", { class: "fault", role: "alert" }, fault) : html(drawn));
    if (key === asked) asked = "";
    show();
  });
  show();
}

const html = text => { const made = element("div"); made.innerHTML = text; return made; };

/** Images by their titles, with one alternative text. */
function rows(images, alt, look = "rows") {
  const parts = Object.entries(images).map(([title, source]) =>
    element("div", {}, title, element("br"), element("img", { src: source, alt: "" })));
  return element("div", { class: look, role: "img", "aria-label": alt }, ...parts);
}

// ---- numbers: a seeded generator, sets of points, an exact field, samplers

/** Uniform numbers from a seed (mulberry32); `.normal()` are N(0, 1), by Box and Muller. */
export function generator(seed) {
  let state = seed >>> 0;
  const next = () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
  next.normal = () => Math.sqrt(-2 * Math.log(1 - next())) * Math.cos(2 * Math.PI * next());
  return next;
}

const many = (n, make) => Array.from({ length: n }, (_, i) => make(i));
const polar = (radius, angle) => [radius * Math.cos(angle), radius * Math.sin(angle)];
const along = (x, h, v) => x.map((one, k) => one + h * v[k]);
const blurred = (x, std, random) => x.map(one => one + std * random.normal());
const MEANS = many(8, k => polar(1.5, k * Math.PI / 4)), STD = 0.15;

export const SETS = { // as the package's 2-D sets: a point
  "eight Gaussians": random => blurred(MEANS[Math.floor(8 * random())], STD, random),
  "two moons": random => {
    const [x, y] = polar(1, Math.PI * random()), side = random() < 0.5 ? 1.2 : -1.2;
    return blurred([side * (x - 0.5), side * (y - 0.25)], 0.08, random);
  },
  checkerboard: random => {
    const column = Math.floor(4 * random()), row = 2 * Math.floor(2 * random()) + column % 2;
    return [column - 2 + random(), row - 2 + random()];
  },
  spirals: random => {
    const radius = Math.sqrt(random()), arm = random() < 0.5 ? 0 : Math.PI;
    return blurred(polar(2 * radius, 3 * Math.PI * radius + arm), 0.05, random);
  },
};

/** E[eps - x0 | x_t = x] of the eight Gaussians, on the linear path. */
export function exactVelocity(x, t) {
  const a = 1 - t, variance = (a * STD) ** 2 + t * t, shrink = a * STD * STD / variance;
  const near = MEANS.map(m => -((x[0] - a * m[0]) ** 2 + (x[1] - a * m[1]) ** 2) / (2 * variance));
  const top = Math.max(...near), share = near.map(v => Math.exp(v - top)), total = sum(share);
  return x.map((v, k) => (v - sum(MEANS.map((m, j) => share[j] * (m[k] + shrink * (v - a * m[k])))) / total) / t);
}

export const SAMPLERS = { // one step of a point from t to s, and the evaluations it takes
  Euler: [(f, x, t, s) => along(x, s - t, f(x, t)), 1],
  Heun: [(f, x, t, s) => {
    const slope = f(x, t), next = f(along(x, s - t, slope), s);
    return along(along(x, (s - t) / 2, slope), (s - t) / 2, next);
  }, 2],
  RK4: [(f, x, t, s) => {
    const h = s - t, middle = (s + t) / 2, k1 = f(x, t), k2 = f(along(x, h / 2, k1), middle);
    const k3 = f(along(x, h / 2, k2), middle), k4 = f(along(x, h, k3), s);
    return x.map((v, k) => v + h / 6 * (k1[k] + 2 * k2[k] + 2 * k3[k] + k4[k]));
  }, 4],
  SDE: [(f, x, t, s, random) => { // Euler and Maruyama, with w = t
    const v = f(x, t), eps = along(x, 1 - t, v);
    return blurred(along(along(x, s - t, v), (s - t) / 2, eps), Math.sqrt(t * (t - s)), random);
  }, 1],
};

// ---- `dispersive_loss` of the package and its gradient, of B rows of `dim` numbers one after the other in z

const part = (x, i, dim) => x.subarray(i * dim, (i + 1) * dim);
const dot = (a, b) => { let all = 0; for (let k = 0; k < a.length; k += 1) all += a[k] * b[k]; return all; };
const apart = (a, b) => { let all = 0; for (let k = 0; k < a.length; k += 1) all += (a[k] - b[k]) ** 2; return all; };
const rms = z => Math.sqrt(dot(z, z) / z.length);

/** out (n x m) += A (n x k) B (k x m); A's element (i, j) is at i * down + j * right. n and k are even. */
function multiply(out, A, B, n, k, m, down = k, right = 1) {
  for (let i = 0; i < n; i += 2) for (let j = 0; j < k; j += 2) { // two by two: half the memory access
    const at = i * down + j * right, o = i * m, p = o + m, b = j * m, c = b + m;
    const a0 = A[at], a1 = A[at + right], a2 = A[at + down], a3 = A[at + down + right];
    for (let q = 0; q < m; q += 1) {
      const v = B[b + q], w = B[c + q];
      out[o + q] += a0 * v + a1 * w;
      out[p + q] += a2 * v + a3 * w;
    }
  }
  return out;
}

export function dispersive(z, dim, { kind, tau, diagonal }) {
  const B = z.length / dim, cosine = kind === "infonce_cosine", log = kind !== "hinge", per = cosine ? 2 : dim;
  const of = a => Math.floor(a / dim), size = many(B, i => (cosine ? Math.hypot(...part(z, i, dim)) || 1 : 1));
  const x = z.map((v, a) => v / size[of(a)]), rows = many(B, i => part(x, i, dim)), weights = new Float64Array(B * B);
  const pairs = many(B, i => many(i, j => [i, j])).flat(), D = pairs.map(([i, j]) => apart(rows[i], rows[j]) / per);
  const near = log && !diagonal ? Math.min(...D) : 0, own = diagonal ? B : 0, count = B * (B - 1) + own;
  const values = D.map(d => (log ? Math.exp((near - d) / tau) : Math.max(0, tau - d) ** 2)); // for cosine D is 1 - cos
  const total = own * (log ? 1 : tau ** 2) + 2 * sum(values);
  pairs.forEach(([i, j], p) => { // dL / dz_i is the sum of w_ij (z_i - z_j)
    const w = 4 / per * (log ? -values[p] / (total * tau) : -2 * Math.sqrt(values[p]) / count);
    weights[i * B + j] = weights[j * B + i] = -w;
    weights[i * B + i] += w;
    weights[j * B + j] += w;
  });
  const gradient = multiply(z.map(() => 0), weights, x, B, B, dim);
  if (cosine) { // only around the origin
    const outward = rows.map((one, i) => dot(one, part(gradient, i, dim)));
    gradient.forEach((g, a) => { gradient[a] = (g - outward[of(a)] * x[a]) / size[of(a)]; });
  }
  return { loss: log ? Math.log(total / count) - (near - Number(cosine)) / tau : total / count, gradient };
}

/** `floor` of the package: the lower bound of the loss of B rows. */
export function floor({ kind, tau, diagonal }, B, dim) {
  const own = diagonal ? 1 / B : 0; // share of the diagonal
  if (kind === "hinge") return own * tau ** 2;
  if (kind === "infonce_l2") return Math.log(own);
  return Math.log(own * Math.exp(1 / tau) + (1 - own) * Math.exp(-1 / (tau * (B - 1))));
}

/** exp of the entropy of the singular values of points of the plane, centred. */
export function effectiveRank(z) {
  const [x, y] = [0, 1].map(k => points(z).map(p => p[k])).map(v => v.map(one => one - sum(v) / v.length));
  const half = Math.hypot((dot(x, x) - dot(y, y)) / 2, dot(x, y)), middle = (dot(x, x) + dot(y, y)) / 2;
  const sizes = [half, -half].map(v => Math.sqrt(Math.max(0, middle + v)));
  return Math.exp(-sum(sizes.map(s => s / sum(sizes)).map(p => (p ? p * Math.log(p) : 0))));
}

// ---- the playground: points in the plane, the push on each, and their movement under the loss

export const VARIANTS = { // options of the loss, limits of its axis
  l2: [{ kind: "infonce_l2", diagonal: true }, [-5, 0.6]],
  "l2, no diagonal": [{ kind: "infonce_l2", diagonal: false }, [-5, 0.6]],
  cosine: [{ kind: "infonce_cosine", diagonal: true }, [-1.2, 4.3]],
  hinge: [{ kind: "hinge", diagonal: false }, [-0.15, 4.2]],
};
const RACE = "race of the first three";
const TAUS = [0.25, 0.5, 1, 2], BATCHES = [2, 4, 8, 16, 32], SCALES = [0.1, 0.25, 0.5, 1, 2, 3, 5];
const EXTENT = 7.8, ARROW = 1.3; // half side of the plane, length of an arrow for B |g| >= 1
const GRID = many(15, i => 0.1 * 60 ** (i / 14)); // scales of the curve
const RATE = 0.012, HASTE = 3, FAR = 1e6; // the step size is RATE times B; steps in a frame; no point goes farther
const points = z => many(z.length / 2, i => [z[2 * i], z[2 * i + 1]]);

/** B points in a disc, as `cloud` of the package; a larger batch contains the points of a smaller one. */
export function cloud(B) {
  const part = (i, step) => (0.5 + i * step) % 1;
  return Float64Array.from(many(B, i =>
    polar(1.3 * Math.sqrt(part(i, 0.7548776662)), 2 * Math.PI * part(i, 0.5698402910))).flat());
}

/** Points one step down the gradient. */
export function descended(z, options) {
  const { gradient } = dispersive(z, 2, options);
  return z.map((v, a) => clamp(v - RATE * z.length / 2 * gradient[a], -FAR, FAR));
}

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };

/** Calls `moved([x, y], the element where the drag began)` while a pointer is pressed in a panel. */
function dragged(node, plane, moved) {
  let taken = null;
  const move = event => { if (taken && event.isPrimary) moved(plane.under(event, node.querySelector("svg")), taken); };
  node.addEventListener("pointermove", move);
  node.addEventListener("lostpointercapture", event => { if (event.isPrimary) taken = null; });
  node.addEventListener("pointerdown", event => {
    if (!event.isPrimary || event.button || event.ctrlKey) return; // a second finger, or what opens a menu
    taken = event.target;
    taken.focus();
    node.setPointerCapture(event.pointerId);
    move(event);
  });
}

/** A panel whose points can be dragged, or chosen by Tab and moved by arrow keys: `moved(i, [x, y])`. */
function arena(color, moved) {
  const plane = panel({ x: [-EXTENT, EXTENT], y: [-EXTENT, EXTENT], width: 350, height: 350 });
  const node = element("figure", { class: "panel", style: plane.style });
  node.innerHTML = `<figcaption></figcaption>${plane.open}<g></g><g></g></svg>`;
  const [title, canvas] = node.children, [, back, dots] = canvas.children;
  canvas.setAttribute("role", "group"); // its points are controls
  canvas.removeAttribute("aria-hidden");
  let z;

  dragged(node, plane, (point, dot) => { if (dot.dataset.i) moved(Number(dot.dataset.i), point); });
  dots.addEventListener("keydown", event => {
    const step = ARROWS[event.key], i = Number(event.target.dataset.i);
    if (!step) return;
    event.preventDefault();
    moved(i, [0, 1].map(k => clamp(z[2 * i + k] + 0.15 * step[k], -EXTENT, EXTENT)));
  });

  /** Arrows are logarithmic in length: full for B |g| >= 1, none for B |g| <= 1e-3. */
  function pushes(gradient) {
    return points(z).map((point, i) => {
      const g = gradient.subarray(2 * i, 2 * i + 2), norm = Math.hypot(...g) + 1e-300;
      const length = ARROW * clamp(1 + Math.log10(z.length / 2 * norm) / 3, 0, 1);
      const tip = along(point, -length / norm, g);
      return length ? plane.line([point, tip], INK, 3) + plane.dots([tip], INK, 8, 1) : "";
    }).join("");
  }

  return {
    node,
    draw(name, alt, at, gradient) {
      z = at;
      if (dots.childElementCount !== z.length / 2) {
        dots.innerHTML = points(z).map((_, i) => `<circle class="point" r="9" fill="${color}"
          stroke="#fff" tabindex="0" role="img" data-i="${i}"/>`).join("");
      }
      points(z).forEach((point, i) => {
        const [x, y] = plane.pixel(point), where = point.map(v => v.toFixed(2)).join(", ");
        const said = { cx: x, cy: y, "aria-label": `point ${i + 1} of ${z.length / 2} at ${where}` };
        for (const [key, value] of Object.entries(said)) dots.children[i].setAttribute(key, value);
      });
      title.textContent = name;
      back.innerHTML = pushes(gradient);
      canvas.setAttribute("aria-label", alt);
    },
  };
}

/** Keeps the value of a step. When there are many, only every second one is kept. */
function note(list, step, value) {
  if (list.at(-1)?.[0] === step) list.pop();
  list.push([step, value]);
  if (list.length > 400) list.splice(0, list.length, ...list.filter((_, i) => i % 2 === 0));
}

const shortly = v => (Number.isFinite(v) ? v.toPrecision(Math.abs(v) < 1 ? 2 : 3).replace("-", "−") : "none");

/** Lines over the steps, with the last values in the title. `lines`: { color, values: [[step, value], ...], level }. */
function traces(name, lines, { log = false, low = NaN, high = NaN, least = -Infinity } = {}) {
  const scale = v => (log ? Math.log10(Math.max(v, 1e-4)) : v), levels = lines.map(one => one.level ?? NaN);
  const all = [...lines.flatMap(one => one.values.map(p => p[1])), ...levels, low, high].filter(Number.isFinite);
  const ends = [Math.max(least, Math.min(...all)), Math.max(least, ...all)]; // what is below `least` is on the edge
  const last = Math.max(1, ...lines.map(one => one.values.at(-1)[0]));
  const axes = panel({ x: [0, last], y: ends.map(scale), width: 290, height: 110, left: 80, right: 10, below: 10 });
  const drawn = lines.map(({ color, values }, k) => [
    Number.isFinite(levels[k]) ? axes.line([0, last].map(x => [x, scale(levels[k])]), color, 2, "2 6") : "",
    axes.line(values.map(([step, v]) => [step, scale(v)]), color, 4, DASHES[k]),
  ]);
  const now = lines.map(({ color, values }) => colored(shortly(values.at(-1)[1]), color)).join(" ");
  return axes.svg(`${name} ${now}`, axes.ends(ends.map(shortly)), drawn.flat());
}

function playground(root) {
  const choices = { variant: [...Object.keys(VARIANTS), RACE], tau: TAUS, B: BATCHES, s: SCALES };
  const moved = name => (name === "tau" || name === "s" ? draw() : restart());
  const { row, picture, value } = stage(root, choices, [0, 1, 3, 3], moved);
  const fields = element("div", { class: "panels", style: "flex-grow: 2.6" });
  const lines = strip(), curve = element("div", { style: "display: contents" });
  row.append(...runner(() => go(HASTE), ["step", () => go(1)], { reset: restart }).buttons);
  picture.append(fields, lines);
  let arms;

  const scaled = (arm, k) => arm.z.map(v => k * v); // z are the points at scale 1
  const options = arm => ({ ...VARIANTS[arm.name][0], tau: value("tau") });

  function restart() {
    const names = value("variant") === RACE ? Object.keys(VARIANTS).slice(0, 3) : [value("variant")];
    arms = names.map((name, k) => {
      const color = COLORS[k], field = arena(color, (i, point) => {
        arm.z.set(point.map(v => v / value("s")), 2 * i);
        draw();
      });
      const arm = { name, color, field, z: cloud(value("B")), steps: 0, loss: [], rms: [], rank: [] };
      return arm;
    });
    fields.replaceChildren(...arms.map(arm => arm.field.node), ...(arms.length === 1 ? [curve] : []));
    draw();
  }

  function go(steps) {
    for (const arm of arms) {
      many(steps, () => { arm.z = descended(scaled(arm, value("s")), options(arm)).map(v => v / value("s")); });
      arm.steps += steps;
    }
    draw();
  }

  function draw() {
    const [tau, B, s] = ["tau", "B", "s"].map(value);
    const said = arms.map(arm => {
      const z = scaled(arm, s), { loss, gradient } = dispersive(z, 2, options(arm)), low = floor(options(arm), B, 2);
      const size = B * rms(gradient) * Math.SQRT2, now = { loss, rms: rms(z), rank: effectiveRank(z) };
      for (const [key, v] of Object.entries(now)) note(arm[key], arm.steps, v);
      const above = low > -Infinity ? `${(loss - low).toFixed(3)} above floor ${low.toFixed(3)}` : "without a floor";
      const alt = `${B} points at scale ${s}, ${arm.name}, tau = ${tau}, step ${arm.steps}: loss ${loss.toFixed(3)}, `
        + `${above}, RMS ${shortly(now.rms)}, effective rank ${shortly(now.rank)}.`;
      const title = `${arm.name}: B|g| = ${shortly(size)}`, arrows = `Arrows show the push on each: ${title}.`;
      arm.field.draw(title, `${alt} ${arrows}`, z, gradient);
      arm.level = low;
      return alt;
    });
    if (arms.length === 1) curve.innerHTML = everyScale(arms[0]);
    const drawn = (key, level) => arms.map(arm => ({ color: arm.color, values: arm[key], level: level && arm.level }));
    paint(lines, `Lines over steps. ${said.join(" ")}`, traces("loss and floor", drawn("loss", true), { least: -6 }),
      traces("RMS", drawn("rms"), { log: true }), traces("effective rank", drawn("rank"), { low: 1, high: 2 }));
  }

  function everyScale(arm) {
    const limits = VARIANTS[arm.name][1], ends = [GRID[0], GRID.at(-1)].map(Math.log10), now = arm.loss.at(-1)[1];
    const axes = panel({ x: ends, y: limits, height: 290, left: 60, below: 64 });
    const title = `loss ${colored(shortly(now), RED)} at every scale, ${
      arm.level > -Infinity ? `floor ${shortly(arm.level)}` : "no floor"}`;
    const losses = GRID.map(k => [Math.log10(k), dispersive(scaled(arm, k), 2, options(arm)).loss]);
    return axes.svg(title, axes.line(losses, BLUE),
      arm.level > limits[0] ? axes.line(ends.map(x => [x, arm.level]), INK, 2, "8 6") : "",
      axes.dots([[Math.log10(value("s")), now]], RED, 18, 1), axes.ends(limits),
      axes.across([0.1, 0.5, 1, 5].map(k => [Math.log10(k), k]), "scale s"));
  }

  restart();
}

// ---- trajectories through the exact field of eight Gaussians

const T_END = 1e-3; // at t = 0 the exact velocity is 0 / 0
const TRACED = 24; // points whose path is drawn

/** The points x after each of `steps` steps: (steps + 1, points, 2). */
export function trajectory(sampler, steps, x) {
  const random = generator(2), ways = [x], time = k => 1 + k / steps * (T_END - 1);
  for (let k = 0; k < steps; k += 1) {
    ways.push(ways[k].map(p => SAMPLERS[sampler][0](exactVelocity, p, time(k), time(k + 1), random)));
  }
  return ways;
}

function trajectories(root) {
  const choices = { sampler: Object.keys(SAMPLERS), steps: [1, 2, 4, 8, 16, 32], part: many(41, i => i / 40) };
  const random = generator(1), start = many(200, () => blurred([0, 0], 1, random)), kept = {};
  const exact = trajectory("RK4", 64, start).at(-1), plane = panel({ x: [-3.2, 3.2], y: [-3.2, 3.2] });
  const { made, row, picture, value } = stage(root, choices, [0, 2, 40], () => draw(made.part.index));
  row.append(...player(made.part, { between: draw }));
  picture.append(strip());

  function draw(at) {
    const name = value("sampler"), steps = value("steps"), ways = kept[name + steps] ??= trajectory(name, steps, start);
    const done = at / made.part.last * steps + 1e-9, whole = Math.floor(done), next = ways[Math.min(whole + 1, steps)];
    const x = ways[whole].map((p, i) => along(p, done - whole, next[i].map((v, k) => v - p[k])));
    const said = `step ${whole} of ${steps}, ${whole * SAMPLERS[name][1]} evaluations`;
    const past = ways.slice(0, whole + 1), traced = x.slice(0, TRACED).map((p, i) => [...past.map(was => was[i]), p]);
    paint(picture.firstChild, `${x.length} samples of ${name} after ${said} of the velocity, part ${value("part")};`
      + " beside them the same noise, moved exactly to eight Gaussians.",
    plane.svg(`${name}: ${said}`, traced.map(way => plane.line(way, PALE, 2)), plane.dots(x, RED, 7)),
    plane.svg("the same noise, moved exactly", plane.dots(exact, BLUE, 7)));
  }

  draw(made.part.index);
}

// ---- training in the page: a network of two hidden layers learns the velocity of a set, with the loss and without

const SIZES = [8, 128, 128, 2]; // the point and six cosines of the time, to the velocity
const ROWS = 64, PARTICLES = 128; // rows of a batch; particles that are drawn
const FLIGHT = 45, REST = 1.4; // steps of a particle from noise to data; with its rest they take REST times as long

/** A network initialised as in torch, and Adam's state; W (in x out) and b of each layer are views of one array. */
export function network(random) {
  const views = all => SIZES.slice(1).map((out, l) => {
    const at = sum(SIZES.slice(1, l + 1).map((one, k) => (SIZES[k] + 1) * one)), ends = at + SIZES[l] * out;
    return { W: all.subarray(at, ends), b: all.subarray(ends, ends + out) };
  });
  const total = sum(SIZES.slice(1).map((out, l) => (SIZES[l] + 1) * out));
  const [weights, gradient, first, second] = many(4, () => new Float64Array(total));
  const layers = views(weights), slopes = views(gradient);
  layers.forEach(one => Object.values(one).forEach(array => array.forEach((_, i) => {
    array[i] = (2 * random() - 1) / Math.sqrt(one.W.length / one.b.length);
  })));
  return { weights, gradient, first, second, layers, slopes, steps: 0 };
}

/** Rows x (n x 2) at times t (n): the input of each layer, and the sigmoid in its SiLU. */
function forward(net, x, t) {
  const n = t.length, input = new Float64Array(n * SIZES[0]);
  t.forEach((time, i) => {
    input.set([x[2 * i], x[2 * i + 1]], i * SIZES[0]);
    for (let k = 1; k < SIZES[0] - 1; k += 1) input[i * SIZES[0] + 1 + k] = Math.cos(Math.PI * k * time);
  });
  const shares = [], after = [input];
  net.layers.forEach(({ W, b }, l) => {
    const out = new Float64Array(n * b.length);
    for (let i = 0; i < n; i += 1) out.set(b, i * b.length);
    shares.push(multiply(out, after[l], W, n, SIZES[l], b.length).map(v => 1 / (1 + Math.exp(-v))));
    after.push(l === 2 ? out : out.map((v, i) => v * shares[l][i]));
  });
  return { shares, after };
}

/** Points x0 with noise and times: x_t and the velocity that the network learns. */
export function batch(n, draws, random, times = random) {
  const x = new Float64Array(2 * n), v = new Float64Array(2 * n), t = Float64Array.from({ length: n }, times);
  t.forEach((time, i) => draws(random).forEach((x0, k) => {
    const eps = random.normal();
    x[2 * i + k] = (1 - time) * x0 + time * eps;
    v[2 * i + k] = eps - x0;
  }));
  return { x, v, t };
}

/** One step of Adam on flow matching, with `weight` times the loss on hidden layer `tap` (1 or 2). */
export function trainStep(net, { x, v, t }, { weight, tap, ...loss }) {
  const { weights, gradient, first, second, layers, slopes } = net, n = t.length;
  const { shares, after } = forward(net, x, t);
  let passed = after[3].map((out, i) => (out - v[i]) / n); // the mean is over 2 n numbers
  gradient.fill(0);
  for (let l = 2; l >= 0; l -= 1) {
    const [inputs, outputs] = SIZES.slice(l, l + 2), { W } = layers[l], turned = new Float64Array(W.length);
    multiply(slopes[l].W, after[l], passed, inputs, n, outputs, 1, inputs);
    passed.forEach((d, i) => { slopes[l].b[i % outputs] += d; });
    if (l === 0) break;
    W.forEach((w, a) => { turned[a % outputs * inputs + Math.floor(a / outputs)] = w; });
    const back = multiply(new Float64Array(n * inputs), passed, turned, n, outputs, inputs);
    if (weight && l === tap) dispersive(after[l], inputs, loss).gradient.forEach((g, i) => { back[i] += weight * g; });
    passed = back.map((d, i) => {
      const s = shares[l - 1][i];
      return d * (s + after[l][i] * (1 - s));
    });
  }
  net.steps += 1;
  const one = 1 - 0.9 ** net.steps, two = 1 - 0.999 ** net.steps;
  gradient.forEach((g, i) => { // Adam
    first[i] += 0.1 * (g - first[i]);
    second[i] += 0.001 * (g * g - second[i]);
    weights[i] -= 4e-3 * first[i] / one / (Math.sqrt(second[i] / two) + 1e-8);
  });
}

/** Rows (n x dim) projected on `axes` (2 x dim), which are then turned towards the plane of largest variance. */
function project(rows, dim, axes) {
  const n = rows.length / dim, mean = new Float64Array(dim), across = new Float64Array(2 * dim);
  rows.forEach((v, a) => { mean[a % dim] += v / n; });
  const centred = rows.map((v, a) => v - mean[a % dim]);
  axes.forEach((v, a) => { across[a % dim * 2 + Math.floor(a / dim)] = v; });
  const places = multiply(new Float64Array(2 * n), centred, across, n, dim, 2);
  axes.set(multiply(new Float64Array(2 * dim), places, centred, 2, n, dim, 1, 2)); // one step of the power method,
  const [one, other] = [0, 1].map(k => part(axes, k, dim)); // and orthogonal again
  const shared = dot(one, other) / dot(one, one);
  other.forEach((v, m) => { other[m] -= shared * one[m]; });
  for (const a of [one, other]) { const size = Math.hypot(...a) || 1; a.forEach((v, m) => { a[m] = v / size; }); }
  return points(places);
}

const DRAWN = "your drawing";

function train(root) {
  const choices = { data: [...Object.keys(SETS), DRAWN], loss: Object.keys(VARIANTS),
    weight: [0.01, 0.03, 0.1, 0.3, 1, 3], tau: TAUS, layer: ["first hidden", "second hidden"] };
  const { made, row, picture, value } = stage(root, choices, [1, 0, 3, 1, 0], restart);
  const square = panel({ x: [-3, 3], y: [-3, 3], width: 230, height: 230 });
  const pad = element("figure", { class: "panel pad", style: square.style });
  const [flights, lines] = many(2, strip);
  flights.style.flex = "968 1 630px";
  row.append(...runner(frame, ["50 steps", fifty], { restart }).buttons);
  picture.append(element("div", { class: "panels", style: "flex-grow: 1.3" }, pad, flights), lines);
  let arms, random, probe, shown, flown, extent, drawing = [[0, 0]], budget = 10; // ms of training in a frame

  const draws = r => (value("data") !== DRAWN ? SETS[value("data")](r)
    : blurred(drawing[Math.floor(r() * drawing.length)], 0.06, r));
  const options = () => ({ ...VARIANTS[value("loss")][0], tau: value("tau"), tap: made.layer.index + 1 });

  function restart() { // both networks: equal initial weights, later equal batches
    const other = generator(1);
    random = generator(0);
    arms = ["without", "with"].map((name, k) => ({
      name, color: COLORS[k], weight: k && value("weight"), net: network(generator(2)), held: [], gap: [], size: [],
      axes: Float64Array.from({ length: 2 * SIZES[1] }, generator(3).normal),
    }));
    shown = many(250, () => draws(other));
    probe = batch(ROWS, draws, other, (_, i) => (i + 0.5) / ROWS);
    [flown, extent] = [Infinity, 0];
    fly();
    draw();
  }

  function learn() {
    const drawn = batch(ROWS, draws, random);
    arms.forEach(arm => trainStep(arm.net, drawn, { weight: arm.weight, ...options() }));
  }

  function fly() { // each particle one step from noise to data
    if (flown > REST * FLIGHT) {
      const noise = Float64Array.from({ length: 2 * PARTICLES }, generator(4 + arms[0].net.steps).normal);
      arms.forEach(arm => { [arm.x, arm.was] = [noise, noise]; });
      flown = -1;
    }
    flown += 1;
    if (flown === 0 || flown > FLIGHT) return;
    const t = new Float64Array(PARTICLES).fill(1 - (flown - 1) / FLIGHT);
    arms.forEach(arm => {
      const v = forward(arm.net, arm.x, t).after[3];
      [arm.was, arm.x] = [arm.x, arm.x.map((one, i) => one - v[i] / FLIGHT)];
    });
  }

  function frame(passed) { // as many training steps as the time allows beside drawing, at least one
    budget = passed < 1100 / FPS ? Math.min(20, budget + 0.5) : budget / 2;
    const until = performance.now() + budget;
    do learn(); while (performance.now() < until);
    fly();
    draw();
  }

  function fifty() {
    many(50, learn);
    flown = Infinity;
    many(FLIGHT + 1, fly);
    draw();
  }

  function draft(point) {
    drawing = value("data") === DRAWN ? [...drawing, point] : [point];
    made.data.index = made.data.last;
    restart();
  }

  dragged(pad, square, draft);

  function draw() {
    const { tap, ...loss } = options(), low = floor(loss, ROWS, SIZES[1]), steps = arms[0].net.steps;
    const seen = arms.map(arm => {
      if (arm.seen && flown % 3) return arm.seen; // each third frame is often enough for what changes slowly
      const { after } = forward(arm.net, probe.x, probe.t), z = after[tap];
      note(arm.size, steps, rms(z));
      note(arm.held, steps, apart(after[3], probe.v) / (2 * ROWS));
      note(arm.gap, steps, dispersive(z, SIZES[1], loss).loss - (low > -Infinity ? low : 0));
      return (arm.seen = project(z, SIZES[1], arm.axes));
    });
    const reach = 1.1 * Math.max(...seen.flat(2).map(Math.abs)), time = Math.max(0, 1 - flown / FLIGHT).toFixed(2);
    extent = extent ? extent + 0.1 * (reach - extent) : reach; // eased, so that the eye can follow
    const space = panel({ x: [-extent, extent], y: [-extent, extent], width: 230, height: 230 });
    pad.innerHTML = `<figcaption>data: draw here</figcaption>${square.open}${square.dots(shown, INK)}</svg>`;
    const last = (arm, key) => shortly(arm[key].at(-1)[1]), gap = low > -Infinity ? "loss − floor" : "loss, no floor";
    const drawn = key => arms.map(arm => ({ color: arm.color, values: arm[key] }));
    const said = arms.map(arm => `weight ${arm.weight}: flow matching ${last(arm, "held")}, ${gap} ${last(arm, "gap")},`
      + ` RMS ${last(arm, "size")}`).join("; ");
    paint(flights, `Particles at t = ${time}, and features, after ${steps} steps. ${said}.`, arms.map((arm, k) => {
      const x = points(arm.x), of = c => seen[k].filter((_, i) => Math.floor(i / ROWS * CIVIDIS.length) === c);
      return square.svg(`${colored(arm.name, arm.color)}, t = ${time}`,
        square.ways(x.map((p, i) => [part(arm.was, i, 2), p]), arm.color), square.dots(x, arm.color, 7))
        + space.svg(`features, RMS ${last(arm, "size")}`, CIVIDIS.map((color, c) => space.dots(of(c), color, 7, 0.9)));
    }));
    if (flown % 3) return;
    paint(lines, `Lines over the training steps. ${said}.`, traces(`step ${steps}: flow matching`, drawn("held")),
      traces(gap, drawn("gap"), { low: 0 }), traces("RMS of features", drawn("size"), { low: 0 }));
  }

  restart();
}

// ---- maps to click on: neighbours in each block, and attention of each patch

/** A table of buttons: `pressed(i, j)`; `shade(share, [i, j], name, full)` colours shares up to `full`, marks one. */
function grid(rows, columns, corner, pressed) {
  const cells = rows.map((_, i) => columns.map((_, j) => button("", () => pressed(i, j))));
  const heads = columns.map(name => element("th", { scope: "col" }, name));
  const node = element("table", {}, element("tr", {}, element("th", {}, corner), ...heads));
  cells.forEach((line, i) => node.append(element("tr", {}, element("th", { scope: "row" }, rows[i]),
    ...line.map(one => element("td", {}, one)))));
  const shade = (share, [row, column], name, full = 1) => cells.forEach((line, i) => line.forEach((cell, j) => {
    cell.textContent = percent(share(i, j));
    cell.style.background = `color-mix(in srgb, #fee838 ${100 * share(i, j) / full}%, #00224e)`; // the ends of cividis
    cell.style.color = share(i, j) / full > 0.5 ? "#000" : "#fff";
    cell.setAttribute("aria-pressed", i === row && j === column);
    cell.setAttribute("aria-label", `${name(i, j)}: ${cell.textContent}`);
  }));
  return { node, shade };
}

const percent = share => `${Math.round(100 * share)}%`;

function map(root, spec) {
  const { made: { arm }, picture } = stage(root, { arm: spec.arms }, [0], draw), { blocks, levels } = spec;
  const table = grid(levels, blocks, "log-SNR \\ block", (i, j) => { [level, block] = [i, j]; draw(); });
  let [level, block] = [2, 2];
  root.append(element("div", { class: "beside" }, table.node, picture));

  function draw() {
    const share = (i, j) => spec.agreement[arm.index][i][j], near = spec.nearest[arm.index][level][block];
    table.shade(share, [level, block], (i, j) => `block ${blocks[j]}, log-SNR ${levels[i]}`);
    const where = levels[level] === "clean" ? "no noise" : `log-SNR ${levels[level]}`;
    const title = `block ${blocks[block]}, ${where}: ${percent(share(level, block))} of the 5 nearest share the class`;
    const line = (name, tileOf, mark = () => element("span")) => [element("span", {}, name),
      ...near.flatMap((_, i) => [tileOf(i), mark(i)])];
    const own = (i, k) => spec.labels[near[i][k]] === spec.labels[i];
    const mark = (i, k) => element("span", { style: `color: ${own(i, k) ? GREEN : RED}` }, own(i, k) ? "✓" : "✗");
    const nearest = k => line(k ? "" : "nearest", i => tile(spec.digits, near[i][k]), i => mark(i, k));
    const tiles = element("div", { class: "tiles", role: "img", "aria-label": `${arm.value}, ${title}. `
      + "Six digits as the network sees them, and the three nearest others of each." },
      ...line("seen", i => tile(spec.noisy, 6 * level + i)), ...line("clean", i => tile(spec.digits, i)),
      ...[0, 1, 2].flatMap(nearest));
    picture.replaceChildren(element("div", {}, title), tiles);
  }

  draw();
}

/** Attention[image][t][block][head] and nearest[image][t][block] of an image's patches, `spec.side` in a row. */
function patch(root, spec) {
  const { place, picture, value } = stage(root, spec.controls, [0, 0, 0, 0], draw), { side, sheet } = spec;
  const names = many(side, i => i + 1), table = grid(names, names, "row \\ column", (i, j) => { at = [i, j]; draw(); });
  let at = [1, 1];
  root.append(element("div", { class: "beside" }, table.node, picture));

  function draw() {
    const [image, t, block, head] = place(), own = at[0] * side + at[1], times = spec.controls.t.length;
    const weights = spec.attention[image][t][block][head][own], near = spec.nearest[image][t][block][own];
    table.shade((i, j) => weights[i * side + j], at, (i, j) => `row ${i + 1}, column ${j + 1}`, Math.max(...weights));
    const chosen = `row ${at[0] + 1}, column ${at[1] + 1}`;
    const title = `Image ${image}, t = ${value("t")}, block ${block}, head ${head}, ${chosen}`;
    const shown = [image * side ** 2 + own, ...near].map(found => {
      const p = found % side ** 2, made = tile(sheet, Math.floor(found / side ** 2) * times + t);
      made.append(element("div", { class: "mark", style: `left: ${100 / side * (p % side)}%; top: ${
        100 / side * Math.floor(p / side)}%; width: ${100 / side}%; height: ${100 / side}%` }));
      return made;
    });
    const said = `${title}. Below: this patch, and the six with the nearest features.`;
    picture.replaceChildren(said, element("div", { class: "near", role: "img", "aria-label": said }, ...shown));
  }

  draw();
}

/** One image of a sheet of `columns` x `rows`. */
function tile({ source, columns, rows }, i) {
  const made = element("div", { class: "tile" }), x = i % columns, y = Math.floor(i / columns);
  const at = `${100 * x / (columns - 1 || 1)}% ${100 * y / (rows - 1 || 1)}%`;
  made.style.background = `url(${source}) ${at} / ${100 * columns}% auto`;
  return made;
}

// ---- the blind quiz: which of two arms drew the better images from the same noises; names come after the last answer

function quiz(root, spec) {
  const said = element("output", { "aria-live": "polite" }), picture = element("div", { class: "picture" });
  const votes = { left: "left", right: "right", neither: "no difference" }, picked = [];
  const buttons = Object.entries(votes).map(([side, name]) => button(name, () => answer(side)));
  const asked = element("span", {}, "Which look better?");
  root.append(element("div", { class: "controls" }, asked, ...buttons, said), picture);

  function ask() {
    const k = picked.length, [left, right] = spec.swapped[k] ? [1, 0] : [0, 1];
    said.textContent = `Round ${k + 1} of ${spec.rounds.length}`;
    picture.replaceChildren(rows({ left: spec.rounds[k][left], right: spec.rounds[k][right] },
      `Round ${k + 1}. ${spec.alt}`, "rows pair"));
  }

  function answer(side) {
    picked.push(side === "neither" ? 2 : (side === "right") === spec.swapped[picked.length] ? 0 : 1);
    if (picked.length < spec.rounds.length) return ask();
    buttons.forEach(one => { one.disabled = true; });
    const [first, second, neither] = [0, 1, 2].map(arm => picked.filter(one => one === arm).length);
    said.textContent = `Picked: ${spec.arms[0]} ${first}, ${spec.arms[1]} ${second}, no difference ${neither}. `
      + `Guessing would give a difference at least as large with probability ${signTest(first, second).toFixed(2)}.`;
  }

  ask();
}

/** Two-sided: 2 P(X <= min(a, b)) for a fair coin, at most 1. */
export function signTest(a, b) {
  const chosen = k => (k ? chosen(k - 1) * (a + b + 1 - k) / k : 1);
  return Math.min(1, sum(many(Math.min(a, b) + 1, chosen)) * 2 ** (1 - a - b));
}

// ---- how long a number takes to the kernel and back, and two sliders to feel the difference

function latency(root, spec, kernel) {
  const said = element("output", { "aria-live": "polite" }, "waiting for the kernel"), values = many(101, i => i);
  const bars = many(2, () => element("progress", { max: 100, value: 0 }));
  const here = control("in the browser", values, 0, one => { bars[0].value = one.index; });
  const there = control("through the kernel", values, 0, one => kernel.ask({ slider: one.index }));
  const lines = [[here.node, bars[0]], [there.node, bars[1]], [said, button("again", () => ping([]))]];
  root.append(...lines.map(line => element("div", { class: "controls" }, ...line)));
  let times, sent;

  function ping(before) {
    [times, sent] = [before, performance.now()];
    kernel.ask({ ping: times.length });
  }

  kernel.hear(({ ping: answered, slider }) => {
    if (slider !== undefined) bars[1].value = slider;
    if (answered !== times.length) return; // not of this measurement
    const all = [...times, performance.now() - sent], counted = all.slice(1).sort((a, b) => a - b);
    if (all.length <= PINGS) return ping(all); // the first does not count: it waited for the cell to end
    const [median, slowest] = [counted[counted.length >> 1], counted.at(-1)].map(ms => ms.toFixed(0));
    said.textContent = `to the kernel and back: median ${median} ms, slowest ${slowest} ms of ${PINGS}: sliders `
      + (median < 60 ? "feel immediate" : "are slow; is the kernel far away, or busy?");
  });
  ping([]);
}

// ---- the lecture console: every demo in large type, each opened by its button or its number

const DEMOS = {
  playground: ["Playground", "Larger s: why do the arrows get short? Larger tau? Then play: which points stop?"],
  train: ["Learn", "Same start, with and without the loss. How do features and particles change? You can draw data."],
  noise: ["Noise", "Same digits, same noise. Which path loses them first? At the same t, or at the same log-SNR?"],
  trajectories: ["Samplers", "Play: watch the steps. Then halve the evaluations: which sampler still finds the data?"],
  denoising: ["Denoising", "Play: at which step can you name each digit? Raise the scale: what is gained, and lost?"],
  training: ["Training", "Same noise in a column. Play: when can you name a digit? Do the two runs become different?"],
  map: ["Blocks", "Click on a cell: six digits as the network sees them, and this block's neighbours of each."],
  patch: ["Patches", "Click on a patch: where does each head attend, and which patches are most like this one?"],
  umap: ["UMAP", "Do you see the same with another seed? Areas and distances say nothing about dispersion."],
  quiz: ["Blind test", "Six digits from each network, from the same noises. The names come after the last round."],
};

function lecture(root, spec, kernel) {
  root.classList.add("lecture");
  const nav = element("nav", { "aria-label": "demos" });
  const pages = Object.entries(DEMOS).map(([id, [title, hint]]) => {
    const page = element("section", { "data-demo": id, "aria-label": title });
    page.append(element("h2", {}, title), element("p", {}, hint));
    nav.append(button(title, () => open(page)));
    return page;
  });
  root.append(nav, ...pages);

  function open(page) {
    const demo = spec.demos[page.dataset.demo];
    if (page.childElementCount === 2) KINDS[demo.kind](page, demo, kernel);
    pages.forEach((one, i) => {
      one.hidden = one !== page;
      nav.children[i].setAttribute("aria-current", one === page);
    });
  }

  const page = root.parentNode === document.body; // in a notebook, number keys act only inside the demo
  (page ? document : root).addEventListener("keydown", event => {
    const chosen = /^\d$/.test(event.key) && nav.children[(Number(event.key) + 9) % 10];
    if (!chosen || event.ctrlKey || event.altKey || event.metaKey || event.target.tagName === "SELECT") return;
    chosen.focus(chosen.click()); // a control that had the focus is hidden now, and would hear no other key
  });
  open(pages[0]);
}
