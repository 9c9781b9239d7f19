// The page that asks which of two videos is better. The server holds the state; the page shows it and sends keys.
"use strict";

const $ = (id) => document.getElementById(id);
const SIDES = ["left", "right"];
const KEYS = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie", s: "skip" };
const SAID = { left: "left is better", right: "right is better", tie: "tie", skip: "both bad, cannot say" };
// In seconds: two videos further apart than the first are brought together by speed, than the second by a jump. A jump
// makes a long video decode from its last key frame, so it must stay rare.
const DRIFT = 0.03;
const LARGEST_DRIFT = 0.5;
const LARGEST_HASTE = 0.2;
const FLASH_MS = 140;

let state = null;
let shownSince = null; // when both videos could be seen; null: not yet, and no vote is taken
let busy = false;
let paused = false;

const videos = () => [...document.querySelectorAll("figure > video")];

async function ask(path, body) {
  const options = body && {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  };
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer. Start it again and open the address that it prints.");
  }
  if (answer.ok) return answer.json();
  const error = new Error((await answer.text()).trim());
  error.status = answer.status;
  throw error;
}

async function load() {
  try {
    show(await ask("state"));
  } catch (error) {
    say(error.message);
  }
}

function say(text) {
  $("message").textContent = text;
}

function show(now) {
  const changed = !state || state.question?.number !== now.question?.number;
  state = now;
  $("rater").textContent = now.rater;
  $("bar").max = now.total;
  $("bar").value = now.done;
  $("count").textContent = `${now.done} of ${now.total}`;
  $("undo").disabled = !now.last;
  $("last").textContent = now.last ? `: ${SAID[now.last.choice]}` : "";
  $("ask").hidden = !now.question;
  $("finished").hidden = !!now.question;
  if (changed) showQuestion();
}

function showQuestion() {
  shownSince = null;
  paused = false;
  enable(false);
  // A video that is only removed goes on loading.
  videos().forEach((video) => video.removeAttribute("src"));
  SIDES.forEach((side) => $(side).replaceChildren());
  if (!state.question) return;
  $("prompt").textContent = state.question.prompt;
  SIDES.forEach((side) => $(side).replaceChildren(medium(state.question, side)));
  if (state.next) SIDES.forEach((side) => ahead(state.next, side));
}

const address = (question, side) => `video/${question.number}/${side}`;

function medium(question, side) {
  const element = document.createElement(question.kind === "image" ? "img" : "video");
  element.addEventListener("error", () => failed(element, side));
  if (question.kind === "image") {
    element.alt = `${side} picture`;
    element.addEventListener("load", ready);
  } else {
    Object.assign(element, { muted: true, playsInline: true, preload: "auto" });
    element.addEventListener("canplaythrough", ready);
    element.addEventListener("ended", loop);
    element.addEventListener("timeupdate", keepStep);
  }
  element.src = address(question, side);
  return element;
}

// So that the next pair is there when it is asked: the browser keeps it.
function ahead(question, side) {
  fetch(address(question, side)).then((answer) => answer.blob()).catch(() => {});
}

function failed(element, side) {
  if (!element.isConnected) return;
  const note = document.createElement("p");
  note.textContent = `The ${side} video cannot be shown (${element.error?.message || "not loaded"}).`;
  element.replaceWith(note);
}

function seen(element) {
  return element.tagName === "IMG" ? element.complete && element.naturalWidth > 0 : element.readyState >= 4;
}

function ready() {
  const media = SIDES.map((side) => $(side).firstElementChild);
  if (shownSince !== null || !media.every((element) => element && element.tagName !== "P" && seen(element))) return;
  shownSince = performance.now();
  enable(true);
  replay();
}

function enable(on) {
  document.querySelectorAll("#votes button, #others button").forEach((button) => (button.disabled = !on));
  // What cannot be shown can be left out.
  document.querySelector("[data-choice=skip]").disabled = false;
}

function replay() {
  paused = false;
  for (const video of videos()) {
    video.currentTime = 0;
    // Refused by a browser that waits for a click: R and Space still play.
    video.play().catch(() => {});
  }
}

function pause() {
  paused = !paused;
  for (const video of videos()) paused ? video.pause() : video.play().catch(() => {});
}

function loop() {
  if (videos().every((video) => video.ended)) replay();
}

function keepStep() {
  const [left, right] = videos();
  if (!right || left.ended || right.ended || left.seeking || right.seeking) return;
  const behind = left.currentTime - right.currentTime;
  if (Math.abs(behind) > LARGEST_DRIFT) right.currentTime = left.currentTime;
  const haste = Math.abs(behind) > DRIFT ? behind : 0;
  right.playbackRate = 1 + Math.max(-LARGEST_HASTE, Math.min(LARGEST_HASTE, haste));
}

async function send(path, body, flash) {
  if (busy) return;
  busy = true;
  say("");
  const figure = SIDES.includes(flash) ? $(flash) : null;
  figure?.classList.add("chosen");
  try {
    const [now] = await Promise.all([ask(path, body), new Promise((done) => setTimeout(done, FLASH_MS))]);
    show(now);
  } catch (error) {
    // Another window went on: show where this rater is now.
    if (error.status === 409) await load();
    say(error.message);
  } finally {
    figure?.classList.remove("chosen");
    busy = false;
  }
}

function vote(choice) {
  if (!state?.question || (shownSince === null && choice !== "skip")) return;
  const seconds = shownSince === null ? 0 : (performance.now() - shownSince) / 1000;
  send("vote", { number: state.question.number, choice, seconds }, choice);
}

function undo() {
  if (state?.last) send("undo", { number: state.last.number });
}

document.addEventListener("keydown", (event) => {
  // A key that is held down is one vote; Alt and the left arrow are the browser's.
  if (event.repeat || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const button = document.activeElement?.tagName === "BUTTON";
  if (KEYS[key]) vote(KEYS[key]);
  else if (key === "u" || key === "Backspace") undo();
  else if (key === "r") replay();
  else if (key === " " && !button) pause();
  else return;
  event.preventDefault();
});

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  // Space would press it again, rather than stop the videos.
  if (event.detail) button.blur();
  if (button.dataset.choice) vote(button.dataset.choice);
  else ({ undo, replay, pause })[button.id]();
});

load();
