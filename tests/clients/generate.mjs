// What transformers.js makes of the jobs, in Node and in a page: ids after a batch of prompts, or texts of a pipeline.

export async function run(library, jobs) {
  const results = [];
  for (const { directory, dtype, ids, mask, texts, length, more } of jobs) {
    const options = { dtype, device: typeof window === "undefined" ? "cpu" : "wasm" };
    if (texts) {
      const generator = await library.pipeline("text-generation", directory, options);
      const found = await generator(texts, { max_new_tokens: more, do_sample: false });
      results.push(found.map(([one]) => one.generated_text));
      await generator.dispose();
      continue;
    }
    const tensor = (rows) => new library.Tensor("int64", rows.flat().map(BigInt), [rows.length, rows[0].length]);
    const model = await library.AutoModelForCausalLM.from_pretrained(directory, options);
    const inputs = { inputs: tensor(ids), attention_mask: tensor(mask) };
    const found = await model.generate({ ...inputs, max_length: length, do_sample: false, eos_token_id: null });
    results.push(found.tolist().map((row) => row.slice(ids[0].length).map(Number)));
    await model.dispose();
  }
  return results;
}
