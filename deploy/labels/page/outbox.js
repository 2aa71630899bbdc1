// Judgements on their way to the server. Each is kept in the browser until the server has answered that it is stored, and
// is sent again after a failure: its id makes sure that it counts once.

export const key = location.hash.slice(1);
const PLACE = `manta-labels-${key}`;
const RETRY_MS = 2000;

export async function ask(path, options = {}) {
  const response = await fetch(path, { ...options, headers: { authorization: `Bearer ${key}` } });
  const answer = await response.json();
  if (!response.ok) throw Object.assign(new Error(answer.error), { status: response.status });
  return answer;
}

export const pause = () => new Promise((resolve) => setTimeout(resolve, RETRY_MS));

const waiting = () => JSON.parse(localStorage.getItem(PLACE) ?? "[]");
const keep = (judgements) => localStorage.setItem(PLACE, JSON.stringify(judgements));

export function put(judgement) {
  keep([...waiting(), judgement]);
}

// Sends all that is kept, until it is stored or refused. say(text) is called with what the annotator should know.
export async function send(say) {
  for (let first; (first = waiting()[0]);) {
    try {
      await ask("api/judgements", { method: "POST", body: JSON.stringify(first) });
      say("");
    } catch (error) {
      if (![400, 404, 409].includes(error.status)) {
        say(`not saved yet: ${waiting().length}, kept in this browser (${error.message}); trying again`);
        await pause();
        continue;
      }
      say(`not saved: ${error.message}`);
    }
    keep(waiting().filter((each) => each.id !== first.id));
  }
}
