/* The prediction queue (ring.h, parking.h, prediction_queue.h), for an exhaustive search:

     spin -a prediction_queue.pml && cc -O2 -DSAFETY -o pan pan.c && ./pan -m100000

   Two producers push FIRST and SECOND records into a ring of N slots, displacing the oldest where it is
   full (three wrap round it; -DSECOND=2: 69 million states, 250 s, 3.4 GB with -DCOLLAPSE); two
   consumers pop with wait_pop until the queue is closed and empty. Each line that touches shared
   memory is one step, as each atomic operation is in C++; memory is sequentially consistent here (the
   orders are ThreadSanitizer's business). What must hold, in every interleaving:
     - a slot is read or written by one thread at a time (touch),
     - each record leaves once, whole: popped, displaced or refused (leave, and the end of init),
     - nobody sleeps for ever (spin reports a deadlock as an invalid end state).
   Each of BROKEN_CLAIM, BROKEN_DISPLACE and BROKEN_PARKING takes out one thing that this rests on; the
   search must then find a violation. */

#define N 2
#define P 2
#define C 2
#define FIRST 2
#ifndef SECOND
#define SECOND 1
#endif
#define RECORDS (FIRST + SECOND)

byte sequence[N];     /* position p of slot p % N: free at p, holds at p + 1, free again at p + N */
byte value[N];
byte touching[N];
byte head, tail;
bool left[RECORDS];
bool closed;

byte waiters;         /* Parking */
bool locked;
bool asleep[C];

byte producers_done;
byte consumers_done;

inline touch(slot) { atomic { touching[slot]++; assert(touching[slot] == 1) } }
inline untouch(slot) { touching[slot]-- }
inline leave(record) { atomic { assert(!left[record]); left[record] = true } }

/* compare_exchange_strong: on failure `expected` becomes what is there */
inline exchange(word, expected, done) {
#ifdef BROKEN_CLAIM
  done = (word == expected);
  if :: done -> word = expected + 1 :: else -> expected = word fi
#else
  atomic {
    done = (word == expected);
    if :: done -> word = expected + 1 :: else -> expected = word fi
  }
#endif
}

inline lock() { atomic { !locked -> locked = true } }
inline unlock() { locked = false }

/* The waiter is announced before it looks for the last time; the notifier, who looks at the waiters
   after it has published, holds the mutex once before it wakes. */
inline notify_one() {
  if
  :: waiters == 0
  :: else ->
     lock(); unlock();
     atomic {
       if
       :: asleep[0] -> asleep[0] = false
       :: asleep[1] -> asleep[1] = false
       :: else
       fi
     }
  fi
}

inline notify_all() {
  if
  :: waiters == 0
  :: else -> lock(); unlock(); atomic { asleep[0] = false; asleep[1] = false }
  fi
}

proctype Producer(byte record, end) {
  byte position, seen, first;
  bool done, finished;
  do
  :: record == end -> break
  :: else ->
    finished = false;
    done = false;
    position = tail;
    do
    :: finished -> break
    :: else ->
       seen = sequence[position % N];                       /* claim_free */
       if
       :: seen == position -> exchange(tail, position, done); finished = done
       :: seen > position -> position = tail
       :: seen < position ->                                /* no room: push displaces the oldest */
          seen = sequence[position % N];
          first = head;
          if
#ifdef BROKEN_DISPLACE
          :: first + N == position ->                       /* without asking whether it is written */
#else
          :: seen + N == position + 1 && first + N == position ->
#endif
             exchange(head, first, done);
             if
             :: done ->
                touch(first % N);
                leave(value[first % N]);
                untouch(first % N);
                sequence[first % N] = first + N;
                done = false;
                position = tail
             :: else -> position = tail
             fi
          :: else ->
             if
             :: seen != position ->
                if
                :: tail != position -> position = tail
                :: else ->
                   if
                   :: sequence[position % N] != seen -> position = tail
                   :: else -> finished = true               /* slot_busy: refused */
                   fi
                fi
             :: else -> position = tail
             fi
          fi
       fi
    od;
    if
    :: done ->                                              /* publish */
       touch(position % N);
       value[position % N] = record;
       untouch(position % N);
       sequence[position % N] = position + 1;
       notify_one()
    :: else -> leave(record)
    fi;
    atomic { record++; position = 0; seen = 0; first = 0 }  /* values that no longer count: fewer states */
  od;
  producers_done++
}

inline try_pop() {
  got = false;
  position = head;
  do
  :: seen = sequence[position % N];
     if
     :: seen < position + 1 -> break
     :: seen > position + 1 -> position = head
     :: else ->
        exchange(head, position, got);
        if
        :: got ->
           touch(position % N);
           leave(value[position % N]);
           untouch(position % N);
           sequence[position % N] = position + N;
           break
        :: else
        fi
     fi
  od
}

inline ready() {
  last = closed;
  try_pop();
  atomic { position = 0; seen = 0 }
}

proctype Consumer(byte me) {
  byte position, seen;
  bool got, last;
  do
  :: ready();                                               /* spin */
     if
     :: got || last
     :: else ->                                             /* sleep */
#ifndef BROKEN_PARKING
        waiters++;
#endif
        lock();
        do
        :: ready();
           if
           :: got || last -> break
           :: else ->
#ifdef BROKEN_PARKING
              waiters++;
#endif
              atomic { asleep[me] = true; unlock() };       /* condition_variable::wait */
              !asleep[me];
#ifdef BROKEN_PARKING
              waiters--;
#endif
              lock()
           fi
        od;
        unlock();
#ifndef BROKEN_PARKING
        waiters--
#endif
     fi;
     if :: got :: else -> break fi
  od;
  consumers_done++
}

init {
  byte i;
  atomic {
    for (i : 0 .. N - 1) { sequence[i] = i }
    run Producer(0, FIRST);
    run Producer(FIRST, RECORDS);
    for (i : 0 .. C - 1) { run Consumer(i) }
  }
  producers_done == P;
  closed = true;
  notify_all();
  consumers_done == C;
  atomic {
    for (i : 0 .. RECORDS - 1) { assert(left[i]) }
    assert(head == tail && waiters == 0)
  }
}
