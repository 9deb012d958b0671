// The strip of the eviction time machine: a cell for each token, drawn at any step of a recorded generation.
// All numbers come once; a step applies the evictions between it and the last one. Text is only ever textContent.

const SIZES = [[600, 14, 20], [2000, 11, 17], [Infinity, 8, 14]]  // up to so many tokens: width and height of a cell
const AROUND = 28  // tokens of the text shown before and after the one that is pointed at
const PLAYED_MS = 150
const MARK = "#E8710A"  // the first token, where attention sinks are
const states = new WeakMap()
const steps = new Map()  // step that each recording was left at: Streamlit may make its strip anew

const array = (Kind, encoded) => new Kind(Uint8Array.from(atob(encoded), (c) => c.charCodeAt(0)).buffer)
const percent = (share) => `${(100 * share).toPrecision(2)} %`

class TimeMachine {
  constructor(root, data) {
    this.find = (name) => root.querySelector(`.${name}`)
    this.id = data.id
    this.labels = data.labels
    this.seen = data.seen
    this.heads = data.heads
    this.starts = array(Uint32Array, data.starts)  // of each step, where its evictions begin
    this.tokens = array(Uint32Array, data.tokens)  // that are evicted
    this.counts = array(Uint32Array, data.counts)  // by how many heads
    this.attention = array(Float32Array, data.attention)
    this.nats = array(Float32Array, data.nats)
    this.written = data.context + data.question  // the first token of the continuation
    this.context = data.context
    this.last = this.seen.length - 1
    this.held = new Int32Array(this.labels.length).fill(this.heads)  // of those that are read: see `isRead`
    this.first = new Int32Array(this.labels.length)  // step of the first eviction, and of the latest so far
    for (let step = this.last; step > 0; step--) this.each(step, (token) => { this.first[token] = step })
    this.step = 0
    this.cursor = null
    this.chosen = []
    this.timer = null
  }

  each(step, act) {
    for (let i = this.starts[step]; i < this.starts[step + 1]; i++) act(this.tokens[i], this.counts[i])
  }

  isRead(token) { return token < this.seen[this.step] }

  go(step) {
    step = Math.min(Math.max(step, 0), this.last)
    while (this.step < step) this.each(++this.step, (token, heads) => { this.held[token] -= heads })
    while (this.step > step) this.each(this.step--, (token, heads) => { this.held[token] += heads })
    steps.set(this.id, this.step)
    this.draw()
  }

  play(on = this.timer === null) {
    clearInterval(this.timer)
    this.timer = null
    if (on && this.step === this.last) this.go(0)
    if (on) {
      this.timer = setInterval(() => { this.step < this.last ? this.go(this.step + 1) : this.play(false) }, PLAYED_MS)
    }
    this.find("play").textContent = on ? "Pause" : "Play"
  }

  // Where cells are.

  layOut() {
    const canvas = this.find("strip"), ratio = window.devicePixelRatio || 1
    const width = canvas.clientWidth, n = this.labels.length
    ;[, this.cellWidth, this.cellHeight] = SIZES.find(([most]) => n <= most)
    this.columns = Math.max(1, Math.floor(width / this.cellWidth))
    const height = Math.ceil(n / this.columns) * this.cellHeight + 2
    canvas.style.height = `${height}px`
    canvas.width = Math.round(width * ratio)
    canvas.height = Math.round(height * ratio)
    this.context2d = canvas.getContext("2d")
    this.context2d.setTransform(ratio, 0, 0, ratio, 0, 0)
    this.width = width
    this.height = height
    const style = getComputedStyle(this.find("time-machine"))
    this.text = style.color
    this.primary = style.getPropertyValue("--st-primary-color").trim() || this.text
  }

  at(event) {
    const box = this.find("strip").getBoundingClientRect()
    const column = Math.floor((event.clientX - box.left) / this.cellWidth)
    const token = Math.floor((event.clientY - box.top) / this.cellHeight) * this.columns + column
    return column >= 0 && column < this.columns && token >= 0 && token < this.labels.length ? token : null
  }

  // What is seen.

  draw() {
    const began = performance.now()
    const c = this.context2d, w = this.cellWidth - 2, h = this.cellHeight - 5, seen = this.seen[this.step]
    c.clearRect(0, 0, this.width, this.height)
    c.lineWidth = 1
    for (let token = 0; token < this.labels.length; token++) {
      const x = (token % this.columns) * this.cellWidth + 1, y = Math.floor(token / this.columns) * this.cellHeight + 1
      c.fillStyle = c.strokeStyle = this.text
      if (token >= seen) {
        c.globalAlpha = 0.45
        c.fillRect(x + w / 2 - 1, y + h / 2 - 1, 2, 2)
      } else {
        const share = this.held[token] / this.heads
        c.globalAlpha = 0.55
        c.strokeRect(x + 0.5, y + 0.5, w - 1, h - 1)
        if (share > 0) {  // from the bottom up, so that more is not told by colour alone
          const filled = Math.max(1, Math.round(share * h))
          c.fillStyle = this.primary
          c.globalAlpha = 0.45 + 0.55 * share
          c.fillRect(x, y + h - filled, w, filled)
        }
      }
      c.globalAlpha = 1
      if (token >= this.written) {
        c.fillStyle = this.text
        c.fillRect(x, y + h + 1, w, 2)
      }
      if (token === 0) {
        c.fillStyle = MARK
        c.fillRect(x, y + h + 1, w, 3)
      }
    }
    c.lineWidth = 2
    for (const token of this.chosen) this.outline(token, this.text)
    if (this.cursor !== null) this.outline(this.cursor, this.primary)
    this.tell()
    this.find("time-machine").dataset.drawnMs = (performance.now() - began).toFixed(1)
  }

  outline(token, colour) {
    const x = (token % this.columns) * this.cellWidth, y = Math.floor(token / this.columns) * this.cellHeight
    this.context2d.strokeStyle = colour
    this.context2d.strokeRect(x + 1, y + 1, this.cellWidth - 2, this.cellHeight - 3)
  }

  tell() {
    const slider = this.find("step"), told = this.stepInWords()
    slider.value = this.step
    slider.setAttribute("aria-valuetext", told)
    this.find("told").textContent = told
    const strip = this.find("strip"), about = this.cursor === null ? "" : this.tokenInWords(this.cursor)
    strip.setAttribute("aria-valuenow", this.cursor ?? 0)
    strip.setAttribute("aria-valuetext", about || "no token")
    this.find("about").textContent = about || "Point at a token, or move to one with the arrow keys; click or press Enter to choose it."
    this.read()
  }

  stepInWords() {
    const seen = this.seen[this.step], n = this.step - 2
    let held = 0
    for (let token = 0; token < seen; token++) held += this.held[token]
    const kept = `${seen.toLocaleString()} tokens read, ${percent(held / (seen * this.heads))} of their pairs held`
    if (this.step === 0) return `The context is read, nothing is evicted: ${kept}`
    if (this.step === 1) return `The context is compressed: ${kept}`
    const next = n < this.nats.length ? `; the next token “${this.labels[this.written + n]}” costs ${this.nats[n].toFixed(2)} nats` : ""
    return (n === 0 ? "The question is read" : `Token ${n} of the continuation is read`) + `: ${kept}${next}`
  }

  tokenInWords(token) {
    const name = `Token ${token} “${this.labels[token]}”${token === 0 ? " (first token)" : ""}`
    if (!this.isRead(token)) return `${name}: not read yet`
    const left = this.held[token], before = `${percent(this.attention[token])} of a head's attention while it was held`
    if (left === this.heads) return `${name}: held in all ${this.heads} kv heads · ${before}`
    const first = this.first[token]
    return `${name}: held in ${left} of ${this.heads} kv heads, first evicted after ${this.seen[first].toLocaleString()} tokens · ${before}`
  }

  read() {
    const at = this.cursor ?? this.chosen[0] ?? Math.min(this.seen[this.step], this.labels.length) - 1
    const start = Math.max(0, at - AROUND), end = Math.min(this.labels.length, at + AROUND + 1)
    const spans = []
    for (let token = start; token < end; token++) {
      const span = document.createElement("span"), share = this.held[token] / this.heads
      span.textContent = this.labels[token]
      span.className = !this.isRead(token) ? "unread" : share > 0 ? "held" : "evicted"
      span.style.setProperty("--share", share)
      if (token === at || this.chosen.includes(token)) span.classList.add(token === at ? "cursor" : "chosen")
      spans.push(span, " ")
    }
    this.find("text").replaceChildren(...spans)
  }

  point(token) {
    if (token === this.cursor) return
    this.cursor = token
    this.draw()
  }

  choose(token, more) {
    const others = this.chosen.filter((one) => one !== token)
    this.chosen = !more ? [token] : others.length < this.chosen.length ? others : [...this.chosen, token].sort((a, b) => a - b)
    this.draw()
    this.setTriggerValue("chosen", this.chosen)
  }

  // What is done to it.

  listen() {
    const slider = this.find("step"), strip = this.find("strip")
    slider.max = this.last
    slider.oninput = () => this.go(Number(slider.value))
    slider.onkeydown = (event) => {
      const by = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1 }[event.key]
      if (event.key === " ") this.play()
      else if (by && event.shiftKey) this.go(this.step + 10 * by)
      else return
      event.preventDefault()
    }
    this.find("play").onclick = () => this.play()
    strip.setAttribute("aria-valuemax", this.labels.length - 1)
    strip.onpointermove = (event) => this.point(this.at(event))
    strip.onpointerleave = () => this.point(null)
    strip.onclick = (event) => {
      const token = this.at(event)
      if (token !== null) this.choose(token, event.shiftKey || event.ctrlKey || event.metaKey)
    }
    strip.onkeydown = (event) => {
      const at = this.cursor ?? this.chosen[0] ?? 0, end = this.labels.length - 1, far = event.shiftKey ? 10 : 1
      const to = {
        ArrowLeft: at - far, ArrowRight: at + far, ArrowUp: at - this.columns, ArrowDown: at + this.columns, Home: 0, End: end,
      }[event.key]
      if (to !== undefined) this.point(Math.min(Math.max(to, 0), end))
      else if (event.key === "Enter" || event.key === " ") this.choose(at, event.ctrlKey || event.metaKey || event.shiftKey)
      else return
      event.preventDefault()
    }
    strip.onfocus = () => { if (this.cursor === null) this.point(this.chosen[0] ?? 0) }
  }
}

export default function ({ parentElement, data, setTriggerValue }) {
  let state = states.get(parentElement)
  if (!state || state.machine.id !== data.id) {
    state?.machine.play(false)
    state?.resized.disconnect()
    const machine = new TimeMachine(parentElement, data)
    const resized = new ResizeObserver(() => {
      if (machine.width !== machine.find("strip").clientWidth) {
        machine.layOut()
        machine.draw()
      }
    })
    state = { machine, resized }
    states.set(parentElement, state)
    machine.listen()
    machine.layOut()
    machine.chosen = data.chosen
    machine.go(steps.get(data.id) ?? 1)  // at first, the context is compressed
    resized.observe(machine.find("strip"))
  }
  state.machine.setTriggerValue = setTriggerValue
  state.machine.chosen = data.chosen
  state.machine.layOut()  // the theme may be another
  state.machine.draw()
  return () => {
    state.machine.play(false)
    state.resized.disconnect()
    states.delete(parentElement)
  }
}
