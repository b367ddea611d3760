// What moves on a page of the kit, in one ES module without a build step or a network: the same file runs as an
// anywidget in JupyterLab, Colab and Voila, and inlined in the offline console.
//
// A model's `spec` says what to draw: `spec.kind` is the name of a function in KINDS, which puts a demo into an
// element. All that is not in the spec is asked of the kernel by messages; only `frames` and `latency` do so.

const BLUE = "#0072b2", RED = "#d55e00", GREEN = "#00704f", INK = "#1a1a1a", GREY = "#6e6e6e";
const WIDTH = 1200, HEIGHT = 470, SIZE = 24; // of a picture, in its own units, and of the letters in it
const SQUARE = 420;
const LEFT = [150, 44, SQUARE, SQUARE], RIGHT = [660, 44, SQUARE, SQUARE]; // left, top, width, height of two panels
const FILM_MS = 4000; // what a smooth play takes from end to end
const PINGS = 20; // to the kernel and back
const PAUSE_MS = 50; // before the kernel draws what was not asked for: the next key press goes first
const FRAME_MS = 500; // how long one of a few frames is seen

const EXTENT = 7.8, ARROW = 1.3; // of the playground: half side of its plane, length of an arrow for B |g| >= 1
const GRID = Array.from({ length: 15 }, (_, i) => 0.1 * 60 ** (i / 14)); // scales of the curve beside it
const TRACED = 24; // samples whose way is drawn

const CSS = `
.dk { font: 14px/1.3 sans-serif; color: ${INK}; background: #fff; padding: 2px }
.dk button, .dk select { font: inherit; color: inherit; background: #fff; border: 1px solid ${GREY}; border-radius: 5px;
  padding: .15em .5em; cursor: pointer }
.dk button[aria-pressed=true], .dk button[aria-current=true] { background: ${BLUE}; border-color: ${BLUE}; color: #fff }
.dk button:disabled { opacity: .4; cursor: default }
.dk :focus-visible { outline: 3px solid ${RED}; outline-offset: 1px }
.dk .controls { display: flex; flex-wrap: wrap; gap: .3em 1.2em; align-items: center; margin-bottom: .3em }
.dk label { display: flex; gap: .5em; align-items: center }
.dk output { font-weight: bold }
.dk input[type=range] { width: 9em; margin: 0; accent-color: ${BLUE} }
.dk .picture[aria-busy=true] { opacity: .6 }
.dk .picture svg { display: block; margin: 0 auto; max-width: 100%; max-height: 60vh }
.dk .picture img { max-width: 100% }
.dk figure { margin: 0 }
.dk .point { cursor: grab; touch-action: none }
.dk .rows { display: grid; gap: .2em; max-width: 62em }
.dk .rows.pair { grid-template-columns: 1fr 1fr; gap: .2em 2em; text-align: center }
.dk .rows img { width: 100%; max-height: 24vh; object-fit: contain; object-position: left; image-rendering: pixelated }
.dk .rows.pair img { max-height: 48vh; object-position: center }
.dk .beside { display: flex; flex-wrap: wrap; gap: .5em 2em; align-items: flex-start }
.dk .beside .picture { flex: 1 1 20em }
.dk table { border-collapse: collapse; width: auto; margin: 0; font-size: inherit }
.dk td, .dk th { padding: 1px; font-weight: normal; text-align: center }
.dk td button { width: 4em; padding: .4em 0; border: 3px solid transparent; border-radius: 0 }
.dk td button[aria-pressed=true] { border-color: ${RED} }
.dk .tiles { display: grid; grid-template-columns: auto repeat(6, minmax(2.2em, 4.2em) 1.1em); gap: .15em .1em;
  align-items: center }
.dk .tile { aspect-ratio: 1; image-rendering: pixelated }
.dk .fault { color: #a00; white-space: pre-wrap }
.dk nav { display: flex; flex-wrap: wrap; gap: .3em; margin-bottom: .3em }
.dk.lecture { font-size: 22px; line-height: 1.25 }
.dk.lecture h2 { font-size: 1.25em; margin: .1em 0 0 } .dk.lecture p { margin: 0 0 .2em }
.dk.lecture nav button { flex: auto; font-size: .86em; padding: .2em .1em }
.dk.lecture :is(button, select) { border-width: 2px }
.dk.lecture .controls { min-height: 2em }
.dk.lecture input[type=range] { height: 1.4em }
.dk.lecture .picture svg { max-height: calc(100vh - 232px) }
.dk.lecture .rows { max-width: none }
`;

const KINDS = { frames, playground, noise, sampler, umap, map, quiz, latency, console: lecture };

export default { render };

export function render({ model, el }) {
  el.append(element("style", {}, CSS));
  const root = element("div", { class: "dk" });
  el.append(root);
  if (el !== document.body) root.addEventListener("keydown", event => event.stopPropagation()); // Lab has shortcuts
  const listeners = [];
  const heard = message => listeners.forEach(listener => listener(message));
  model.on("msg:custom", heard);
  const kernel = { ask: message => model.send(message), hear: listener => listeners.push(listener) };
  const spec = model.get("spec");
  KINDS[spec.kind](root, spec, kernel);
  return () => model.off("msg:custom", heard);
}

/** A page that is this module and its data. */
export function alone() {
  const spec = JSON.parse(document.getElementById("data").textContent);
  render({ model: { get: () => spec, on() {} }, el: document.body });
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
  const menu = values.some(value => Number.isNaN(Number(value)));
  const input = menu
    ? element("select", { "aria-label": name }, ...values.map(value => element("option", {}, value)))
    : element("input", { type: "range", min: 0, max: values.length - 1, step: 1, "aria-label": name });
  const readout = element("output", {});
  if (!menu) input.style.width = `${clamp(values.length / 4, 9, 16)}em`;
  readout.style.minWidth = `${Math.max(...values.map(value => String(value).length))}ch`;
  const made = {
    node: element("label", {}, name, input, ...(menu ? [] : [readout])),
    last: values.length - 1,
    get value() { return values[made.index]; },
    get index() { return menu ? input.selectedIndex : Number(input.value); },
    /** Put it elsewhere and say so, without telling `changed`. */
    set index(i) {
      if (menu) input.selectedIndex = i;
      else input.value = i;
      readout.textContent = values[i];
      if (!menu) input.setAttribute("aria-valuetext", values[i]);
    },
    move(i) { made.index = i; changed(made); },
  };
  made.index = index;
  input.addEventListener("input", () => made.move(made.index));
  return made;
}

/** A row of controls over the lists of `choices`, begun at the indices `start`: `changed` gets the name of the one that
 * was moved, `place()` says the indices, and `value(name)` what is chosen. */
function controlRow(choices, start, changed) {
  const made = {}, row = element("div", { class: "controls" });
  Object.entries(choices).forEach(([name, values], k) => {
    made[name] = control(name, values, start[k], () => changed(name));
    row.append(made[name].node);
  });
  const place = () => Object.values(made).map(one => one.index);
  return { made, row, place, value: name => made[name].value };
}

/** Play, pause and one step along a control whose axis is time. `ready` says whether the present frame is drawn yet;
 * `between`, if given, draws an index that is not whole, so that a film is smooth. */
function player(axis, { ready = () => true, between = null }) {
  let timer = 0, at = 0, before = 0;
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const smooth = between && !calm;
  const play = button("play", () => (timer ? stop() : start()));
  const step = button("step", () => { stop(); axis.move(axis.index === axis.last ? 0 : axis.index + 1); });
  axis.node.addEventListener("input", stop);

  function start() {
    if (axis.index === axis.last) axis.move(0);
    [at, before] = [axis.index, performance.now()];
    play.textContent = "pause";
    timer = requestAnimationFrame(go);
  }

  function stop() {
    cancelAnimationFrame(timer);
    timer = 0;
    play.textContent = "play";
  }

  function go(now) {
    const passed = Math.max(0, now - before);
    before = now;
    if (!play.isConnected) return;
    if (ready()) at += smooth ? passed * axis.last / FILM_MS : passed / (calm ? 2 * FRAME_MS : FRAME_MS);
    const whole = Math.min(axis.last, Math.floor(at));
    if (whole !== axis.index) axis.move(whole);
    if (whole === axis.last) return stop();
    if (smooth) between(at);
    timer = requestAnimationFrame(go);
  }

  return [play, step];
}

const clamp = (x, low, high) => Math.max(low, Math.min(high, x));

// ---- pictures as SVG: parts are strings

const ENTITIES = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" };
const escaped = text => String(text).replace(/[&<>"]/g, character => ENTITIES[character]);

function svg(alt, ...parts) {
  return `<svg viewBox="0 0 ${WIDTH} ${HEIGHT}" role="img" aria-label="${escaped(alt)}" font-family="sans-serif"
    font-size="${SIZE}" width="${WIDTH}">${parts.flat().join("")}</svg>`;
}

function words(x, y, text, { color = INK, anchor = "middle" } = {}) {
  return `<text x="${x}" y="${y}" fill="${color}" text-anchor="${anchor}">${escaped(text)}</text>`;
}

/** A part of the picture with axes of its own; what is outside of them is drawn on their edge. */
function panel([left, top, width, height], [x0, x1], [y0, y1]) {
  const pixel = ([x, y]) => [
    left + width * clamp((x - x0) / (x1 - x0), 0, 1),
    top + height * (1 - clamp((y - y0) / (y1 - y0), 0, 1)),
  ].map(v => v.toFixed(1));
  return {
    pixel,
    frame: title => words(left + width / 2, top - 10, title)
      + `<rect x="${left}" y="${top}" width="${width}" height="${height}" fill="none" stroke="${GREY}"/>`,
    dots: (points, color, size = 5, opacity = 0.7) => `<path d="${points.map(p => `M${pixel(p).join(" ")}h0`).join("")}"
      fill="none" stroke="${color}" stroke-width="${size}" stroke-linecap="round" opacity="${opacity}"/>`,
    line: (points, color, size = 3, dash = "") => `<polyline points="${points.map(p => pixel(p).join()).join(" ")}"
      fill="none" stroke="${color}" stroke-width="${size}" stroke-dasharray="${dash}"/>`,
    across: (ticks, name) => ticks
      .map(([x, text]) => words(pixel([x, y0])[0], top + height + 26, text, { color: GREY })).join("")
      + words(left + width / 2, top + height + 52, name, { color: GREY }),
  };
}

// ---- frames that are drawn before, or by the kernel when they are asked for

function frames(root, spec, kernel) {
  const known = new Map(), picture = element("div", { class: "picture" });
  const { made, row, place } = controlRow(spec.controls, spec.start, show), here = () => place().join();
  let asked = "", shown = "";
  for (const [key, frame] of Object.entries(spec.frames)) known.set(key, drawn(frame));
  if (spec.play) row.append(...player(made[spec.play], { ready: () => shown === here() }));
  root.append(row, picture);

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

  /** A place one step away that is not drawn yet: asked for in a pause, since drawing takes longer than a key repeats. */
  function neighbour() {
    const near = place().flatMap((i, k) => [i + 1, i - 1].map(j => place().with(k, j))
      .filter(one => one[k] >= 0 && one[k] < Object.values(spec.controls)[k].length));
    return near.find(one => !known.has(one.join()));
  }

  kernel.hear(({ place: drawnAt, html, fault }) => {
    const key = drawnAt.join();
    known.set(key, fault ? element("pre", { class: "fault", role: "alert" }, fault) : drawn(html));
    if (key === asked) asked = "";
    show();
  });
  show();
}

/** HTML, or images by their titles with one alternative text. */
function drawn(frame) {
  const made = element("div");
  if (typeof frame === "string") made.innerHTML = frame;
  else made.append(rows(frame.rows, frame.alt));
  return made;
}

function rows(images, alt, look = "rows") {
  const parts = Object.entries(images).map(([title, source]) =>
    element("div", {}, title, element("br"), element("img", { src: source, alt: "" })));
  return element("div", { class: look, role: "img", "aria-label": alt }, ...parts);
}

// ---- the loss of B points of the plane and its gradient, as dispersive_loss(z, kind, tau, diagonal) of the package

export function dispersive(z, { kind, diagonal }, tau) {
  if (kind === "covariance") return covariance(z);
  const B = z.length, cosine = kind === "infonce_cosine";
  const norm = z.map(([x, y]) => cosine ? Math.max(Math.hypot(x, y), 1e-12) : 1);
  const u = z.map(([x, y], i) => [x / norm[i], y / norm[i]]);
  const D = u.map(a => u.map(b => ((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2) / 2)); // for cosine this is 1 - cos
  const pairs = D.flatMap((row, i) => row.filter((_, j) => i !== j || diagonal));
  let loss, slope; // slope(D) = dL / dD of one pair
  if (kind === "hinge") {
    loss = pairs.reduce((sum, d) => sum + Math.max(0, tau - d) ** 2, 0) / pairs.length;
    slope = d => -2 * Math.max(0, tau - d) / pairs.length;
  } else {
    const nearest = Math.min(...pairs);
    const total = pairs.reduce((sum, d) => sum + Math.exp((nearest - d) / tau), 0);
    loss = Math.log(total / pairs.length) - nearest / tau + (cosine ? 1 / tau : 0);
    slope = d => -Math.exp((nearest - d) / tau) / total / tau;
  }
  const gradient = u.map((a, i) => {
    const g = [0, 0];
    u.forEach((b, j) => { if (j !== i) for (const k of [0, 1]) g[k] += 2 * slope(D[i][j]) * (a[k] - b[k]); });
    const along = cosine ? g[0] * a[0] + g[1] * a[1] : 0;
    return [(g[0] - along * a[0]) / norm[i], (g[1] - along * a[1]) / norm[i]];
  });
  return { loss, gradient };
}

function covariance(z) {
  const mean = k => z.reduce((sum, p) => sum + p[k], 0) / z.length, m = [mean(0), mean(1)];
  const c = z.map(p => [p[0] - m[0], p[1] - m[1]]);
  const sum = (k, l) => c.reduce((total, p) => total + p[k] * p[l], 0);
  const xx = sum(0, 0), yy = sum(1, 1), both = Math.sqrt(xx * yy) + 1e-300, r = sum(0, 1) / both;
  return {
    loss: (1 + r * r) / 2,
    gradient: c.map(([x, y]) => [r * (y / both - r * x / (xx + 1e-300)), r * (x / both - r * y / (yy + 1e-300))]),
  };
}

// ---- the playground: points of the plane, where each is pushed, the loss at every scale, how far its floor

function playground(root, spec) {
  const { row, value } = controlRow(spec.controls, spec.start, name => (name === "B" ? restart() : draw()));
  row.append(button("reset", restart));
  const picture = element("div", { class: "picture" });
  root.append(row, picture);
  picture.innerHTML = svg("", `<g class="drawn"></g><g class="points"></g>`);
  const canvas = picture.firstChild, [back, dots] = canvas.children;
  canvas.setAttribute("role", "group"); // its points are controls
  const [left, top, side] = [20, 44, SQUARE], unit = side / (2 * EXTENT);
  const plane = panel([left, top, side, side], [-EXTENT, EXTENT], [-EXTENT, EXTENT]);
  let z; // the points at scale 1

  function restart() {
    z = spec.clouds[value("B")].map(point => [...point]);
    dots.innerHTML = z.map((_, i) => `<circle class="point" r="10" fill="${BLUE}" fill-opacity=".85" tabindex="0"
      role="img" data-i="${i}"/>`).join("");
    draw();
  }

  function move(i, x, y) {
    z[i] = [x, y].map(v => clamp(v, -EXTENT, EXTENT) / value("s"));
    draw();
  }

  dots.addEventListener("pointerdown", event => {
    event.target.setPointerCapture(event.pointerId);
    event.target.focus();
  });
  dots.addEventListener("pointermove", event => {
    if (!event.target.hasPointerCapture(event.pointerId)) return;
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(canvas.getScreenCTM().inverse());
    move(Number(event.target.dataset.i), (at.x - left) / unit - EXTENT, EXTENT - (at.y - top) / unit);
  });
  dots.addEventListener("keydown", event => {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (!step) return;
    event.preventDefault();
    const i = Number(event.target.dataset.i), s = value("s");
    move(i, s * z[i][0] + 0.15 * step[0], s * z[i][1] + 0.15 * step[1]);
  });

  function draw() {
    const [variant, tau, B, s] = ["variant", "tau", "B", "s"].map(value), kind = spec.variants[variant];
    const scaled = k => z.map(([x, y]) => [k * x, k * y]), points = scaled(s);
    const { loss, gradient } = dispersive(points, kind, tau), floor = spec.floors[`${variant},${tau},${B}`];
    const size = B * Math.sqrt(gradient.reduce((sum, [x, y]) => sum + x * x + y * y, 0) / B);
    const losses = GRID.map(k => [Math.log10(k), dispersive(scaled(k), kind, tau).loss]);
    points.forEach((point, i) => {
      const [x, y] = plane.pixel(point);
      dots.children[i].setAttribute("cx", x);
      dots.children[i].setAttribute("cy", y);
      const at = point.map(v => v.toFixed(2)).join(", ");
      dots.children[i].setAttribute("aria-label", `point ${i + 1} of ${B} at ${at}`);
    });
    back.innerHTML = plane.frame("pushed downhill") + pushes(points, gradient)
      + curve(kind.limits, losses, [Math.log10(s), loss], floor) + gauge(kind.limits, loss, floor, size);
    canvas.setAttribute("aria-label", `${B} points at scale ${s}, ${variant}, tau = ${tau}: loss ${loss.toFixed(3)}, `
      + (floor === null ? "which has no floor" : `${(loss - floor).toFixed(3)} above its floor ${floor.toFixed(3)}`)
      + `. Arrows show where each point is pushed; B times the size of the gradient is ${size.toPrecision(2)}.`);
  }

  /** Arrows, logarithmic in length: full for B |g| >= 1, none for B |g| <= 1e-3. */
  function pushes(points, gradient) {
    return points.map((point, i) => {
      const norm = Math.hypot(...gradient[i]) + 1e-300;
      const length = ARROW * clamp(1 + Math.log10(points.length * norm) / 3, 0, 1);
      const tip = point.map((v, k) => v - gradient[i][k] / norm * length);
      return length ? plane.line([point, tip], RED, 4) + plane.dots([tip], RED, 8, 1) : "";
    }).join("");
  }

  function curve(limits, losses, here, floor) {
    const ends = [losses[0][0], losses.at(-1)[0]], axes = panel([560, 44, 400, 340], ends, limits);
    return axes.frame("loss at every scale") + axes.line(losses, BLUE)
      + (floor > limits[0] && floor !== null ? axes.line(ends.map(x => [x, floor]), INK, 2, "8 6") : "")
      + axes.dots([here], RED, 18, 1) + axes.across([0.1, 0.5, 1, 5].map(k => [Math.log10(k), k]), "scale s")
      + limits.map(v => words(552, 8 + Number(axes.pixel([0, v])[1]), v, { color: GREY, anchor: "end" })).join("");
  }

  function gauge(limits, loss, floor, size) { // on the axis of the curve, filled from the loss down to the floor
    const axes = panel([1030, 44, 50, 340], [0, 1], limits);
    const [high, low] = [loss, floor ?? limits[0]].map(v => Number(axes.pixel([0, v])[1]));
    return axes.frame("to the floor")
      + `<rect x="1030" y="${high}" width="50" height="${Math.max(0, low - high)}" fill="${BLUE}" opacity=".5"/>`
      + words(1090, clamp(high, 60, low - 4), loss.toFixed(2), { color: RED, anchor: "start" })
      + words(1055, 418, floor === null ? "no floor" : `floor ${floor.toFixed(2)}`)
      + words(1055, 452, `B|g| = ${size.toPrecision(2)}`, { color: RED });
  }

  restart();
}

// ---- noise and paths: x_t = alpha x0 + sigma eps, here

function noise(root, spec) {
  const picture = element("div", { class: "picture" });
  const { made, row, value } = controlRow(spec.controls, spec.start, () => draw(made.t.index));
  row.append(...player(made.t, { between: draw }));
  root.append(row, picture);

  function draw(at) { // in the table of t, whole or between two of its rows
    const [data, path] = ["data", "path"].map(value);
    const table = spec.paths[path], i = Math.min(Math.floor(at), table.length - 2);
    const [alpha, sigma] = [0, 1].map(k => table[i][k] + (at - i) * (table[i + 1][k] - table[i][k]));
    const t = at / (table.length - 1), snr = 2 * Math.log(alpha / sigma);
    const known = Math.abs(snr) < 30 ? snr.toFixed(1) : snr > 0 ? "infinite" : "minus infinite";
    const x = spec.sets[data].map((x0, j) => x0.map((v, k) => alpha * v + sigma * spec.eps[j][k]));
    const plane = panel(LEFT, [-3, 3], [-3, 3]), curves = panel([660, 44, SQUARE, 320], [0, 1], [0, 1.02]);
    const over = k => table.map((row, j) => [j / (table.length - 1), row[k]]);
    picture.innerHTML = svg(
      `${x.length} points of ${data} at t = ${t.toFixed(2)} of the ${path} path: alpha ${alpha.toFixed(2)}, `
        + `sigma ${sigma.toFixed(2)}, log-SNR ${known}.`,
      plane.frame(`${data}, t = ${t.toFixed(2)}`), plane.dots(x, BLUE),
      curves.frame(`α = ${alpha.toFixed(2)} (data), σ = ${sigma.toFixed(2)} (noise)`),
      curves.across([[0, "0"], [0.5, "0.5"], [1, "1"]], "t"),
      curves.line(over(0), BLUE, 4), curves.line(over(1), RED, 4, "14 8"),
      curves.dots([[t, alpha]], BLUE, 22, 1), curves.dots([[t, sigma]], RED, 22, 1),
      words(870, HEIGHT - 8, `log-SNR ${known}`));
  }

  draw(made.t.index);
}

// ---- samplers: where each step leads (steps + 1, points, 2), and between two steps the straight way

function sampler(root, spec) {
  const picture = element("div", { class: "picture" });
  const { made, row, value } = controlRow(spec.controls, spec.start, () => draw(made.part.index));
  row.append(...player(made.part, { between: draw }));
  root.append(row, picture);

  function draw(at) {
    const [name, steps] = ["sampler", "steps"].map(value);
    const ways = spec.ways[`${name},${steps}`], done = at / made.part.last * steps + 1e-9, whole = Math.floor(done);
    const next = ways[Math.min(whole + 1, steps)];
    const x = ways[whole].map((p, i) => p.map((v, k) => v + (done - whole) * (next[i][k] - v)));
    const calls = `${whole * spec.calls[name]} evaluations`, past = ways.slice(0, whole + 1);
    const [left, right] = [LEFT, RIGHT].map(box => panel(box, [-3.2, 3.2], [-3.2, 3.2]));
    picture.innerHTML = svg(
      `${x.length} samples after step ${whole} of ${steps} of ${name}, part ${(at / made.part.last).toFixed(2)} of the `
        + `way, ${calls} of the velocity, beside the same noise carried exactly to eight Gaussians.`,
      left.frame(`${name}: step ${whole} of ${steps}, ${calls}`),
      x.slice(0, TRACED).map((p, i) => left.line([...past.map(visited => visited[i]), p], "#9a9a9a", 1.5)),
      left.dots(x, RED, 6), right.frame("the same noise, carried exactly"), right.dots(spec.exact, BLUE, 6));
  }

  draw(made.part.index);
}

// ---- UMAP: one cloud an arm, one colour and one numeral a class

function umap(root, spec) {
  const picture = element("div", { class: "picture" });
  const { row, value } = controlRow(spec.controls, spec.start, draw), names = Object.keys(spec.controls);
  root.append(row, picture);
  const median = values => [...values].sort((a, b) => a - b)[values.length >> 1];

  function draw() {
    const setting = names.map(value);
    const parts = Object.entries(spec.arms).map(([arm, name], side) => {
      const x = spec.clouds[[arm, ...setting].join("/")];
      const mean = [0, 1].map(k => x.reduce((sum, p) => sum + p[k], 0) / x.length);
      const reach = 1.05 * Math.max(...x.flatMap(p => p.map((v, k) => Math.abs(v - mean[k]))));
      const [across, up] = mean.map(m => [m - reach, m + reach]), axes = panel([LEFT, RIGHT][side], across, up);
      return axes.frame(name) + spec.colours.map((colour, label) => {
        const own = x.filter((_, i) => spec.labels[i] === label);
        const [left, top] = axes.pixel([0, 1].map(k => median(own.map(p => p[k]))));
        return axes.dots(own, colour, 7) + words(left, Number(top) + 8, label);
      }).join("");
    });
    const said = names.map((name, k) => `${name} ${setting[k]}`).join(", ");
    const alt = `UMAP of ${spec.labels.length} digits in both runs, ${said}: one cloud each, no class an island.`;
    picture.innerHTML = svg(alt, parts);
  }

  draw();
}

// ---- what each block knows: a cell of the map opens six digits and whom the block takes for their neighbours

function map(root, spec) {
  const { made: { arm }, row } = controlRow({ arm: spec.arms }, [0], draw), { blocks, levels } = spec;
  let [block, level] = spec.start;
  const cells = levels.map((_, i) => blocks.map((_, j) => button("", () => {
    [block, level] = [j, i];
    draw();
  })));
  const head = element("tr", {}, element("th", {}, "log-SNR \\ block"),
    ...blocks.map(name => element("th", { scope: "col" }, name)));
  const table = element("table", {}, head, ...cells.map((line, i) => element("tr", {},
    element("th", { scope: "row" }, levels[i]), ...line.map(one => element("td", {}, one)))));
  const picture = element("div", { class: "picture" });
  root.append(row, element("div", { class: "beside" }, table, picture));

  function draw() {
    const share = (i, j) => spec.agreement[arm.index][i][j];
    const percent = value => `${Math.round(100 * value)}%`;
    cells.forEach((line, i) => line.forEach((cell, j) => {
      cell.textContent = percent(share(i, j));
      cell.style.background = `color-mix(in srgb, #fee838 ${100 * share(i, j)}%, #00224e)`; // the ends of cividis
      cell.style.color = share(i, j) > 0.5 ? "#000" : "#fff";
      cell.setAttribute("aria-pressed", i === level && j === block);
      cell.setAttribute("aria-label", `block ${blocks[j]}, log-SNR ${levels[i]}: ${cell.textContent}`);
    }));
    const where = levels[level] === "clean" ? "no noise" : `log-SNR ${levels[level]}`;
    const near = spec.nearest[arm.index][level][block];
    const title = `block ${blocks[block]}, ${where}: ${percent(share(level, block))} of the 5 nearest share the class`;
    const line = (name, tileOf, mark = () => "") => [element("span", {}, name),
      ...near.flatMap((_, i) => [tileOf(i), mark(i)])];
    const nearest = k => line(k ? "" : "nearest", i => tile(spec.digits, near[i][k]), i => verdict(near[i][k], i));
    const tiles = element("div", { class: "tiles", role: "img", "aria-label": `${arm.value}, ${title}. `
      + "Six digits as the network sees them, and the three nearest others of each." },
      ...line("seen", i => tile(spec.noisy, 6 * level + i), () => element("span")),
      ...line("clean", i => tile(spec.digits, i), () => element("span")), ...[0, 1, 2].flatMap(nearest));
    picture.replaceChildren(element("div", {}, title), tiles);
  }

  function verdict(found, i) {
    const own = spec.labels[found] === spec.labels[i], mark = element("span", {}, own ? "✓" : "✗");
    mark.style.color = own ? GREEN : RED;
    return mark;
  }

  draw();
}

/** One image of a sheet of `columns` x `rows`. */
function tile({ source, columns, rows }, i) {
  const made = element("div", { class: "tile" }), x = i % columns, y = Math.floor(i / columns);
  const at = `${100 * x / (columns - 1)}% ${100 * y / (rows - 1)}%`;
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
      + `A coin would part them at least so unequally with probability ${signTest(first, second).toFixed(2)}.`;
  }

  ask();
}

/** Two-sided: 2 P(X <= min(a, b)) for a fair coin, at most 1. */
export function signTest(a, b) {
  const n = a + b;
  let term = 0.5 ** n, total = 0;
  for (let k = 0; k <= Math.min(a, b); k += 1) {
    total += term;
    term *= (n - k) / (k + 1);
  }
  return Math.min(1, 2 * total);
}

// ---- how long a number takes to the kernel and back, and two sliders to feel the difference

function latency(root, spec, kernel) {
  const said = element("output", { "aria-live": "polite" }, "waiting for the kernel");
  const values = Array.from({ length: 101 }, (_, i) => i);
  const bars = values.slice(0, 2).map(() => element("progress", { max: 100, value: 0 }));
  const here = control("in the browser", values, 0, one => { bars[0].value = one.index; });
  const there = control("through the kernel", values, 0, one => kernel.ask({ slider: one.index }));
  [here, there].forEach((one, k) => root.append(element("div", { class: "controls" }, one.node, bars[k])));
  root.append(element("div", { class: "controls" }, said, button("again", start)));
  let times, sent;

  function start() { times = []; ping(); }
  function ping() { sent = performance.now(); kernel.ask({ ping: times.length }); }

  kernel.hear(({ ping: answered, slider }) => {
    if (slider !== undefined) bars[1].value = slider;
    if (answered !== times.length) return; // not of this measurement
    times.push(performance.now() - sent);
    if (times.length <= PINGS) return ping();
    const counted = times.slice(1).sort((a, b) => a - b); // the first waited for the cell to end
    const median = counted[counted.length >> 1];
    said.textContent = `to the kernel and back: median ${median.toFixed(0)} ms, slowest `
      + `${counted.at(-1).toFixed(0)} ms of ${counted.length}: sliders `
      + (median < 60 ? "feel immediate" : "lag; is the kernel far away, or busy?");
  });
  start();
}

// ---- the lecture console: every demo in large type, each opened by its button or its number

const DEMOS = {
  playground: ["Playground", "Drag a point, or choose it with Tab and move it with the arrow keys. Make the points "
    + "larger (s): why do the arrows die, and what does a larger tau bring back?"],
  noise: ["Noise and paths", "Play t. At which t do the eight spots melt? Change the path: is it the same t, or the "
    + "same log-SNR?"],
  sampler: ["Samplers", "Play part: watch the steps. Then halve the evaluations: which sampler survives?"],
  training: ["Training", "Same noise in a column. When does colour settle, when shape? Do the two runs part?"],
  guidance: ["Guidance", "Same noise in each place. Raise the scale: what is gained, and what do all images of a class "
    + "lose?"],
  map: ["What each block knows", "Click on a cell: six digits as the network sees them, and whom this block takes for "
    + "their neighbours."],
  umap: ["UMAP", "Does your impression survive another seed? Areas and distances carry no dispersion meaning."],
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

  const page = root.parentNode === document.body; // in a notebook the digits are the demos' only within
  (page ? document : root).addEventListener("keydown", event => {
    const chosen = pages[Number(event.key) - 1];
    if (chosen && !event.ctrlKey && !event.altKey && !event.metaKey && event.target.tagName !== "SELECT") open(chosen);
  });
  open(pages[0]);
}
