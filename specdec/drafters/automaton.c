/* automaton.py compiled: the same states, counts and guesses, bit by bit. Numbers of states and names are as there.
 *
 * Transitions of all states lie in one array, each state's chained; a hash table finds them by state and token.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { NOTHING = 0, ROOT = 1, NONE = -1 };

typedef struct {
    int64_t link, longest, best, first; /* class of the longest string that ends elsewhere too; ...; first transition */
    double count, followed;
} State;

typedef struct {
    int64_t state, token, child, next;
} Edge;

typedef struct {
    State *states;
    Edge *edges;
    int64_t *table; /* of transitions, by state and token */
    int64_t state_count, state_room, edge_count, edge_room, table_mask;
    int64_t depth, whole, end, length;
    double weight, growth;
} Automaton;

static int64_t slot_of(const Automaton *a, int64_t state, int64_t token) {
    uint64_t key = (uint64_t)state * 0x9E3779B97F4A7C15u ^ (uint64_t)token * 0xC2B2AE3D27D4EB4Fu;
    int64_t slot = (int64_t)((key ^ key >> 29) & (uint64_t)a->table_mask);
    while (a->table[slot] != NONE) {
        const Edge *edge = &a->edges[a->table[slot]];
        if (edge->state == state && edge->token == token)
            break;
        slot = (slot + 1) & a->table_mask;
    }
    return slot;
}

static Edge *find(const Automaton *a, int64_t state, int64_t token) {
    int64_t edge = a->table[slot_of(a, state, token)];
    return edge == NONE ? NULL : &a->edges[edge];
}

static int grow_table(Automaton *a, int64_t room) {
    int64_t *table = malloc((size_t)room * sizeof *table);
    if (table == NULL)
        return 0;
    free(a->table);
    a->table = table;
    a->table_mask = room - 1;
    memset(table, 0xFF, (size_t)room * sizeof *table); /* NONE */
    for (int64_t edge = 0; edge < a->edge_count; edge++)
        table[slot_of(a, a->edges[edge].state, a->edges[edge].token)] = edge;
    return 1;
}

/* Room for what entering one token may add: two states, and a split's copies of all transitions of one. */
static int make_room(Automaton *a, int64_t states, int64_t edges) {
    if (a->state_count + states > a->state_room) {
        int64_t room = 2 * (a->state_count + states);
        State *grown = realloc(a->states, (size_t)room * sizeof *grown);
        if (grown == NULL)
            return 0;
        a->states = grown;
        a->state_room = room;
    }
    if (a->edge_count + edges > a->edge_room) {
        int64_t room = 2 * (a->edge_count + edges);
        Edge *grown = realloc(a->edges, (size_t)room * sizeof *grown);
        if (grown == NULL)
            return 0;
        a->edges = grown;
        a->edge_room = room;
    }
    int64_t room = a->table_mask + 1;
    while (room < 2 * (a->edge_count + edges))
        room *= 2;
    return room == a->table_mask + 1 || grow_table(a, room);
}

static int add_edge(Automaton *a, int64_t state, int64_t token, int64_t child) {
    if (!make_room(a, 0, 1))
        return 0;
    a->edges[a->edge_count] = (Edge){state, token, child, a->states[state].first};
    a->states[state].first = a->edge_count;
    a->table[slot_of(a, state, token)] = a->edge_count++;
    return 1;
}

static int64_t add_state(Automaton *a, int64_t longest, int64_t link, double count, double followed, int64_t best) {
    if (!make_room(a, 1, 0))
        return NONE;
    a->states[a->state_count] = (State){link, longest, best, NONE, count, followed};
    return a->state_count++;
}

void automaton_free(Automaton *a) {
    free(a->states);
    free(a->edges);
    free(a->table);
    free(a);
}

void automaton_begin(Automaton *a) {
    a->whole = a->end = ROOT;
    a->length = 0;
}

Automaton *automaton_new(int64_t depth, double growth) {
    Automaton *a = calloc(1, sizeof *a);
    if (a == NULL)
        return NULL;
    a->depth = depth;
    a->growth = growth;
    a->weight = 1.0;
    if (!grow_table(a, 1 << 9) || add_state(a, -1, NOTHING, 0, 0, NONE) == NONE ||
        add_state(a, 0, NOTHING, 0, 0, NONE) == NONE) {
        automaton_free(a);
        return NULL;
    }
    automaton_begin(a);
    return a;
}

static int64_t split(Automaton *a, int64_t state, int64_t token, int64_t known) {
    State of = a->states[known];
    int64_t made = add_state(a, a->states[state].longest + 1, of.link, of.count, of.followed, of.best);
    if (made == NONE)
        return NONE;
    for (int64_t edge = of.first; edge != NONE; edge = a->edges[edge].next)
        if (!add_edge(a, made, a->edges[edge].token, a->edges[edge].child))
            return NONE;
    a->states[known].link = made;
    for (Edge *edge; state && (edge = find(a, state, token)) != NULL && edge->child == known;) {
        edge->child = made;
        state = a->states[state].link;
    }
    return made;
}

static int64_t step(Automaton *a, int64_t whole, int64_t token) {
    Edge *known = find(a, whole, token);
    if (known != NULL) /* in an earlier text */
        return a->states[known->child].longest == a->states[whole].longest + 1 ? known->child
                                                                                : split(a, whole, token, known->child);
    int64_t made = add_state(a, a->states[whole].longest + 1, ROOT, 0, 0, NONE);
    if (made == NONE)
        return NONE;
    while (whole && (known = find(a, whole, token)) == NULL) {
        if (!add_edge(a, whole, token, made))
            return NONE;
        whole = a->states[whole].link;
    }
    if (whole) {
        int64_t child = known->child;
        if (a->states[child].longest != a->states[whole].longest + 1)
            child = split(a, whole, token, child);
        if (child == NONE)
            return NONE;
        a->states[made].link = child;
    }
    return made;
}

static int64_t cut(const Automaton *a, int64_t state, int64_t length) {
    while (length <= a->states[a->states[state].link].longest)
        state = a->states[state].link;
    return state;
}

static int feed(Automaton *a, int64_t token) {
    a->weight *= a->growth;
    a->whole = step(a, a->whole, token);
    if (a->whole == NONE)
        return 0;
    int64_t before = a->end;
    a->length = a->length + 1 < a->depth ? a->length + 1 : a->depth;
    a->end = cut(a, find(a, before, token)->child, a->length);
    for (int64_t state = a->end; state > ROOT; state = a->states[state].link)
        a->states[state].count += a->weight;
    for (; before; before = a->states[before].link) {
        State *of = &a->states[before];
        of->followed += a->weight;
        if (of->best != token &&
            (of->best < 0 ||
             a->states[find(a, before, token)->child].count >= a->states[find(a, before, of->best)->child].count))
            of->best = token;
    }
    return 1;
}

/* Enter tokens; 0 where memory is lacking: the automaton can then only be freed. */
int64_t automaton_feed(Automaton *a, int64_t count, const int64_t *tokens) {
    for (int64_t i = 0; i < count; i++)
        if (!feed(a, tokens[i]))
            return 0;
    return 1;
}

void automaton_end(const Automaton *a, int64_t *place) {
    place[0] = a->end;
    place[1] = a->length;
}

void automaton_advance(const Automaton *a, int64_t *place, int64_t token) {
    int64_t state = place[0], length = place[1];
    const Edge *edge = NULL;
    while (state && (edge = find(a, state, token)) == NULL) {
        state = a->states[state].link;
        length = a->states[state].longest;
    }
    place[0] = ROOT;
    place[1] = 0;
    if (state) {
        place[1] = length + 1 < a->depth ? length + 1 : a->depth;
        place[0] = cut(a, edge->child, place[1]);
    }
}

typedef struct {
    int64_t *tokens, *matched;
    double *shares, score;
    int64_t count;
} Guess;

/* One guess, as automaton.py's _followed. */
static void follow(const Automaton *a, int64_t state, int64_t length, int64_t most, double least, double chance_left,
                   Guess *guess) {
    double chance = 1.0;
    guess->count = 0;
    guess->score = 0.0;
    while (state > ROOT && guess->count < most) {
        const State *of = &a->states[state];
        if (of->followed != 0) {
            int64_t child = find(a, state, of->best)->child;
            if (a->states[a->states[child].link].longest < a->depth) {
                double share = a->states[child].count / of->followed;
                chance *= share;
                if (chance < chance_left || guess->score + chance * (double)(most - guess->count) <= least)
                    return;
                guess->score += chance;
                guess->tokens[guess->count] = of->best;
                guess->shares[guess->count] = share;
                guess->matched[guess->count++] = length;
                state = child;
                length++;
                continue;
            }
        }
        state = of->link;
        length = a->states[state].longest;
    }
}

/* The best guess of up to ``most`` tokens at ``place``: how many tokens it has. The arrays hold twice ``most``. */
int64_t automaton_guess(const Automaton *a, const int64_t *place, int64_t most, double factor, double chance_left,
                        int64_t *tokens, double *shares, int64_t *matched, double *score) {
    Guess best = {tokens, matched, shares, 0.0, 0}, other = {tokens + most, matched + most, shares + most, 0.0, 0};
    int64_t state = place[0], length = place[1];
    while (state > ROOT) {
        if (a->states[state].followed != 0) {
            double bound = (double)length * factor;
            int64_t limit = bound < (double)most ? (int64_t)bound : most;
            if ((double)limit <= best.score) /* as it will be for all shorter ones */
                break;
            follow(a, state, length, limit, best.score, chance_left, &other);
            if (other.score > best.score) {
                Guess better = other;
                other = best;
                best = better;
            }
        }
        state = a->states[state].link;
        length = a->states[state].longest;
    }
    if (best.count && best.tokens != tokens) {
        memcpy(tokens, best.tokens, (size_t)best.count * sizeof *tokens);
        memcpy(matched, best.matched, (size_t)best.count * sizeof *matched);
        memcpy(shares, best.shares, (size_t)best.count * sizeof *shares);
    }
    *score = best.score;
    return best.count;
}
