// The player of a story: the step, the timer and the presentation are here, so that no rerun of the page can lose them.
// The HTML of each step comes from app.components.stage, which escapes it.

const PLAYED_MS = 450
const states = new WeakMap()
const left = (globalThis.l2kvStories ??= new Map())  // how each was left: Streamlit may make its player, or this, anew

const unpacked = async (encoded) => {
  const bytes = Uint8Array.from(atob(encoded), (c) => c.charCodeAt(0))
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json()
}

class Player {
  constructor(root, data) {
    this.find = (name) => root.querySelector(name)
    this.id = data.id
    this.last = data.last
    this.steps = []
    this.timer = null
    this.step = data.begin
    this.heard = (event) => this.keys[event.detail]?.()
    this.keys = {
      ArrowLeft: () => this.go(this.step - 1),
      ArrowRight: () => this.go(this.step + 1),
      " ": () => this.play(),
      Home: () => this.go(0),
      End: () => this.go(this.last),
      p: () => this.present(),
    }
  }

  go(step, playing = false) {
    if (!playing) this.play(false)
    this.step = Math.min(Math.max(step, 0), this.last)
    this.draw()
  }

  play(on = this.timer === null) {
    clearInterval(this.timer)
    this.timer = null
    if (on && this.step === this.last) this.go(0)
    if (on) {
      this.timer = setInterval(
        () => { this.step < this.last ? this.go(this.step + 1, true) : this.play(false) }, PLAYED_MS)
    }
    this.find(".play").textContent = on ? "Pause" : "Play"
  }

  present(on = !this.find("dialog").open) {
    const dialog = this.find("dialog"), player = this.find(".player")
    this.find(".present").textContent = on ? "Close" : "Present"
    if (on) {
      dialog.append(player)
      dialog.showModal()
    } else {
      this.find(".place").append(player)
      dialog.close()
    }
    this.note()
  }

  note() { left.set(this.id, { step: this.step, presented: this.find("dialog").open }) }

  draw() {
    this.note()
    this.find(".step").value = this.step
    // Not `disabled`: a browser gives the keys of a button that is to nobody.
    this.find(".back").setAttribute("aria-disabled", this.step === 0)
    this.find(".next").setAttribute("aria-disabled", this.step === this.last)
    this.find(".told").textContent = this.step
      ? `${this.step} new token${this.step === 1 ? "" : "s"} of ${this.last}`
      : "Press → for the first new token, Space to play"
    this.find(".shown").innerHTML = this.steps[this.step] ?? ""
    for (const said of this.find(".shown").querySelectorAll(".l2kv-said")) said.scrollTop = said.scrollHeight
  }

  async take(sent) {
    if (this.sent === sent) return  // the same story may come with more, such as its rates
    this.sent = sent
    this.steps = await unpacked(sent)
    this.draw()
  }

  listen() {
    const slider = this.find(".step")
    const clicked = { ".play": " ", ".back": "ArrowLeft", ".next": "ArrowRight", ".present": "p" }
    for (const [name, key] of Object.entries(clicked)) this.find(name).onclick = () => this.keys[key]()
    slider.max = this.last
    slider.oninput = () => this.go(Number(slider.value))
    this.find("dialog").onclose = () => this.present(false)
    document.addEventListener("KEY_EVENT", this.heard)
  }

  end() {
    clearInterval(this.timer)
    document.removeEventListener("KEY_EVENT", this.heard)
  }
}

export default function ({ parentElement, data }) {
  let player = states.get(parentElement)
  if (player?.id !== data.id) {
    player?.end()
    player?.present(false)
    player = new Player(parentElement, data)
    states.set(parentElement, player)
    const before = left.get(data.id)
    player.step = before?.step ?? data.begin
    player.listen()
    player.draw()
    if (before?.presented) player.present(true)
  }
  player.take(data.steps)
  return () => {
    player.end()
    states.delete(parentElement)
  }
}
