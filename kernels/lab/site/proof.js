// A GPU's digest of RMSNorm, redone in plain JavaScript. The order is that of kernels/ops/rms_norm.py and
// kernels/arithmetic/sums.py; the inputs are those of kernels/bits.py. Nothing is fetched.
"use strict";
(() => {
  const CHUNK = 1024, EPS = Math.fround(1e-6), SIGNIFICANT_BITS = {float32: 24, bfloat16: 8};

  // ---- Inputs: an integer hash times a power of two.

  function hashed(index, offset) {
    let x = (index + offset) >>> 0;
    x = Math.imul(x ^ (x >>> 16), 0x7feb352d);
    x = Math.imul(x ^ (x >>> 15), 0x2c1b3c6d);
    x = Math.imul(x ^ (x >>> 12), 0x297a2d39);
    return (x ^ (x >>> 15)) >>> 0;
  }

  function portable(rows, width, dtype, seed) {
    const precision = SIGNIFICANT_BITS[dtype], mask = 2 ** precision - 1, half = 2 ** (precision - 1);
    const scale = [1, 0.5, 0.25, 0.125].map(binade => binade * 2 ** (1 - precision));
    const offset = (seed * 0x9e3779b1) % 2 ** 32, out = new Float32Array(rows * width);
    for (let i = 0; i < out.length; i++) {
      const h = hashed(i, offset);
      out[i] = ((h & mask) - half) * scale[h >>> 28 & 3];
    }
    return out;
  }

  // ---- Rounding. A Float32Array rounds what is stored in it to the nearest float32, ties to even, as Math.fround does.
  // One addition, product, quotient or root in float64 that is rounded to float32 is the correctly rounded one.

  function toBfloat16(values) {
    const bits = new Uint32Array(values.buffer, values.byteOffset, values.length), out = new Uint16Array(values.length);
    for (let i = 0; i < out.length; i++) {
      const b = bits[i];
      out[i] = (b & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (b + 0x7fff + (b >>> 16 & 1)) >>> 16;
    }
    return out;
  }

  function fromBfloat16(halves) {
    const bits = new Uint32Array(halves.length);
    for (let i = 0; i < bits.length; i++) bits[i] = halves[i] << 16;
    return new Float32Array(bits.buffer);
  }

  /** The values in dtype: as float32 numbers, and as the bits that a digest is taken of (every NaN the same). */
  function rounded(values, dtype) {
    if (dtype === "bfloat16") {
      const stored = toBfloat16(values);
      return {values: fromBfloat16(stored), stored};
    }
    const stored = new Uint32Array(values.buffer, values.byteOffset, values.length).slice();
    for (let i = 0; i < stored.length; i++) if ((stored[i] & 0x7fffffff) > 0x7f800000) stored[i] = 0x7fc00000;
    return {values, stored};
  }

  // ---- The order.

  /** The sum of the squares of h[start .. start + width): the chunks in the order given, then neighbours in pairs. */
  function sumOfSquares(h, start, width, order, columns) {
    order.forEach((chunk, step) => {
      for (let j = 0; j < CHUNK; j++) {
        const at = chunk * CHUNK + j, value = at < width ? h[start + at] : 0, square = Math.fround(value * value);
        columns[j] = step === 0 ? square : columns[j] + square;
      }
    });
    for (let n = CHUNK / 2; n >= 1; n /= 2)
      for (let j = 0; j < n; j++) columns[j] = columns[2 * j] + columns[2 * j + 1];
    return columns[0];
  }

  /** {y, stream}: the bits of the result, and of the new residual stream where the record has one. */
  function rmsNorm(record, x, order) {
    const {rows, width, dtype, seed} = record;
    const weight = portable(1, width, dtype, seed + 1);
    let h = x, stream = null;
    if (record.residual) {
      const residual = portable(rows, width, dtype, seed + 2), added = new Float32Array(x.length);
      for (let i = 0; i < added.length; i++) added[i] = x[i] + residual[i];
      const sum = rounded(added, dtype);
      h = sum.values;
      stream = sum.stored;
    }
    const y = new Float32Array(x.length), columns = new Float32Array(CHUNK), share = Math.fround(1 / width);
    for (let row = 0; row < rows; row++) {
      const start = row * width, mean = Math.fround(sumOfSquares(h, start, width, order, columns) * share);
      const reciprocal = Math.fround(1 / Math.fround(Math.sqrt(Math.fround(mean + EPS))));
      for (let j = 0; j < width; j++) y[start + j] = Math.fround(h[start + j] * reciprocal) * weight[j];
    }
    return {y: rounded(y, dtype).stored, stream};
  }

  // ---- The digest: SHA-256 of each result's dtype, shape and bits.

  function message(record, result) {
    const name = new TextEncoder().encode(`torch.${record.dtype} (${record.rows}, ${record.width});`);
    const parts = [result.y, result.stream].filter(Boolean)
      .flatMap(part => [name, new Uint8Array(part.buffer, part.byteOffset, part.byteLength)]);
    const whole = new Uint8Array(parts.reduce((n, part) => n + part.length, 0));
    let at = 0;
    for (const part of parts) { whole.set(part, at); at += part.length; }
    return whole;
  }

  // A page that is neither from this computer nor from https has no crypto.subtle.
  async function sha256(bytes) {
    const subtle = globalThis.crypto && crypto.subtle;
    const hash = subtle ? new Uint8Array(await subtle.digest("SHA-256", bytes)) : plainSha256(bytes);
    return Array.from(hash, byte => byte.toString(16).padStart(2, "0")).join("");
  }

  /** The first 32 bits of the fractions of the roots (square or cube) of the first `count` primes: FIPS 180-4. */
  function fractions(count, root) {
    const found = [];
    for (let n = 2; found.length < count; n++) {
      let prime = true;
      for (let d = 2; d * d <= n; d++) if (n % d === 0) prime = false;
      if (prime) { const r = root(n); found.push((r - Math.floor(r)) * 2 ** 32 >>> 0); }
    }
    return found;
  }

  function plainSha256(bytes) {
    const K = fractions(64, Math.cbrt), state = Uint32Array.from(fractions(8, Math.sqrt)), w = new Uint32Array(64);
    const length = Math.ceil((bytes.length + 9) / 64) * 64, padded = new Uint8Array(length);
    padded.set(bytes);
    padded[bytes.length] = 0x80;
    const view = new DataView(padded.buffer);
    view.setUint32(length - 8, Math.floor(bytes.length / 2 ** 29));
    view.setUint32(length - 4, bytes.length * 8 % 2 ** 32);
    const turn = (v, n) => v >>> n | v << 32 - n;
    for (let block = 0; block < length; block += 64) {
      for (let i = 0; i < 16; i++) w[i] = view.getUint32(block + 4 * i);
      for (let i = 16; i < 64; i++) {
        const a = w[i - 15], b = w[i - 2];
        w[i] = w[i - 16] + (turn(a, 7) ^ turn(a, 18) ^ a >>> 3) + w[i - 7] + (turn(b, 17) ^ turn(b, 19) ^ b >>> 10);
      }
      let [a, b, c, d, e, f, g, h] = state;
      for (let i = 0; i < 64; i++) {
        const one = h + (turn(e, 6) ^ turn(e, 11) ^ turn(e, 25)) + (e & f ^ ~e & g) + K[i] + w[i] | 0;
        const two = (turn(a, 2) ^ turn(a, 13) ^ turn(a, 22)) + (a & b ^ a & c ^ b & c) | 0;
        h = g; g = f; f = e; e = d + one | 0; d = c; c = b; b = a; a = one + two | 0;
      }
      [a, b, c, d, e, f, g, h].forEach((value, i) => { state[i] += value; });
    }
    const out = new DataView(new ArrayBuffer(32));
    state.forEach((value, i) => out.setUint32(4 * i, value));
    return new Uint8Array(out.buffer);
  }

  // ---- The page.

  const records = JSON.parse(document.getElementById("proof-records").textContent);
  const part = name => document.getElementById(`proof-${name}`);
  const kept = new Map(); // of each record, the result that had the recorded digest

  /** A whole number in a control. Throws a RangeError that says what it may be. */
  function whole(name, label, most) {
    const text = part(name).value.trim();
    if (!/^\d+$/.test(text) || Number(text) > most)
      throw new RangeError(`${label} must be a whole number from 0 to ${most}, got '${text}'`);
    return Number(text);
  }

  function flipBit(x, record) {
    const row = whole("row", "row", record.rows - 1), column = whole("column", "column", record.width - 1);
    const bit = whole("bit", "bit", record.dtype === "bfloat16" ? 15 : 31);
    const bits = new Uint32Array(x.buffer);
    bits[row * record.width + column] ^= (1 << (record.dtype === "bfloat16" ? bit + 16 : bit)) >>> 0;
  }

  /** The chunks in the order in which they are added, two of them swapped where the reader says so. */
  function chunks(record) {
    const order = Array.from({length: Math.ceil(record.width / CHUNK)}, (_, i) => i);
    if (part("swap").checked) {
      const a = whole("first", "chunk", order.length - 1), b = whole("second", "chunk", order.length - 1);
      [order[a], order[b]] = [order[b], order[a]];
    }
    return order;
  }

  /** In words: how many bits of the result are other than the recorded ones, and the first of them. */
  function difference(record, result) {
    const recorded = kept.get(record.digest);
    if (!recorded) return "";
    let count = 0, first = "";
    const rows = new Set();
    for (const name of ["y", "stream"]) {
      for (let i = 0; recorded[name] && i < recorded[name].length; i++) {
        if (recorded[name][i] === result[name][i]) continue;
        count++;
        rows.add(Math.floor(i / record.width));
        const hex = bits => `0x${bits.toString(16).padStart(record.dtype === "bfloat16" ? 4 : 8, "0")}`;
        first = first || `the first in row ${Math.floor(i / record.width)}, column ${i % record.width} of ` +
          `${name === "y" ? "the result" : "the stream"}: ${hex(recorded[name][i])} became ${hex(result[name][i])}`;
      }
    }
    return count ? `${count.toLocaleString("en")} numbers in ${rows.size} of ${record.rows} rows differ, ${first}.` : "";
  }

  function explain(record, same, order) {
    const flipped = part("flip").checked, moved = order.flatMap((chunk, i) => chunk === i ? [] : [i]);
    const did = [...flipped ? ["one bit of the input was changed"] : [],
                 ...moved.length ? ["two additions changed places"] : []].join(" and ");
    if (same && !did) return "Nothing in this computation depends on a GPU. Only the order of the sum decides.";
    if (same && !flipped && moved.join() === "0,1")
      return "Swapping the first two chunks moves nothing: a + b and b + a are one sum. Swap two later ones.";
    if (same) return `No bit moved, though ${did}: rounding to ${record.dtype} hid it. Try float32, or a higher bit.`;
    return did ? `The digest is another one, since ${did}.`
      : "This browser computes something else than the record says. Please report it, with the browser's name.";
  }

  async function prove() {
    const record = records[part("record").value];
    part("chunks").textContent = String(Math.ceil(record.width / CHUNK) - 1);
    part("recorded").textContent = record.digest;
    part("machine").textContent = `${record.device}, ${record.recorded_at.slice(0, 10)}`;
    const start = performance.now();
    try {
      const x = portable(record.rows, record.width, record.dtype, record.seed), order = chunks(record);
      if (part("flip").checked) flipBit(x, record);
      const result = rmsNorm(record, x, order), here = await sha256(message(record, result));
      const same = here === record.digest, ms = performance.now() - start;
      if (same) kept.set(record.digest, result);
      part("here").textContent = here;
      part("ms").textContent = `${Math.round(ms)} ms`;
      show(same ? "same" : "other", same ? "✓ Same bits as the GPU" : "✗ Other bits than the GPU",
           `${explain(record, same, order)} ${same ? "" : difference(record, result)}`);
    } catch (error) {
      if (!(error instanceof RangeError)) throw error;
      show("wrong", "Not computed", `${error.message}.`);
    }
  }

  function show(state, verdict, words) {
    part("verdict").dataset.state = state;
    part("answer").textContent = verdict;
    part("words").textContent = words;
  }

  records.forEach((record, i) => part("record").add(new Option(record.label, i)));
  part("form").addEventListener("submit", event => { event.preventDefault(); prove(); });
  part("record").addEventListener("change", prove);
  part("flip").addEventListener("change", prove);
  part("swap").addEventListener("change", prove);
  part("form").hidden = false;
  prove();
})();
