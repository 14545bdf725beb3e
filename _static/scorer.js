/* How search results are ranked: the chapters first, the reference of the module last. */
var Scorer = {
  score: function (result) {
    const [page, , , , score] = result;
    if (/\/\d\d_/.test(page)) return score + 30;
    return /\/(api|bibliography)$/.test(page) ? score - 30 : score;
  },
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
