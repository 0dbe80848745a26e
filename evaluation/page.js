const form = document.forms[0], wanted = form.elements, cards = [...document.querySelectorAll('article')];
const plain = text => text.replace(/\s+/g, ' ').trim().toLowerCase();
const texts = cards.map(card => plain(card.textContent));
function apply() {
  const sought = plain(wanted.q.value);
  cards.forEach((card, i) => {
    const fits = name => !wanted[name].value || card.dataset[name] === wanted[name].value;
    card.hidden = !fits('type') || !fits('answer') || !texts[i].includes(sought);
  });
  form.querySelector('output').textContent = cards.filter(card => !card.hidden).length + ' shown';
}
function follow() {
  if (location.hash && !location.hash.includes('=')) return;  // a section
  const state = new URLSearchParams(location.hash.slice(1));
  for (const name of ['type', 'answer', 'q']) wanted[name].value = state.get(name) || '';
  apply();
  if (location.hash) document.getElementById('pictures').scrollIntoView();
}
form.hidden = false;
form.addEventListener('submit', event => event.preventDefault());
form.addEventListener('input', () => {
  const state = [...new FormData(form)].filter(([, value]) => value);
  history.replaceState(null, '', '#' + new URLSearchParams(state));
  apply();
});
addEventListener('hashchange', follow);
addEventListener('beforeprint', () => document.querySelectorAll('details').forEach(part => { part.open = true; }));
follow();
