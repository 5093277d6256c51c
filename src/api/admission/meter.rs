//! What a process holds of an account's limits, and what it has used: pure, so
//! that it can be tried without a clock and a database.

use std::time::{Duration, Instant};

use capx_core::store::grants::{Ask, Given, SLOTS_HELD};

/// A grant is at most this part of a second's burst, so that processes share.
const GRANT_PART: u32 = 10;
/// The most requests of one grant: what a crash can lose.
const GRANT_MAX: u32 = 1_000;
/// Concurrent requests are asked for ahead, as this part of the limit.
const AHEAD_PART: u32 = 16;
/// Slots in use are asked for again before others may take them.
const RENEWAL: Duration = Duration::from_millis(SLOTS_HELD.as_millis() as u64 / 4);
/// When a client should try again that was too fast, or has too much open.
const REFUSAL_MAX: Duration = Duration::from_secs(1);
/// Who was refused is refused again without another question, for this long.
const REFUSAL_HELD: Duration = Duration::from_millis(100);

/// Where an account stands, as headers tell it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    /// Requests a minute.
    pub limit: u32,
    /// Of them left.
    pub remaining: u32,
    /// Seconds until none is used.
    pub reset: u32,
}

/// Why a request is refused, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal {
    /// In a sentence's middle: "requests a minute".
    pub what: Refused,
    /// Until it is worth trying again.
    pub retry_after: Duration,
}

/// Which limit it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// Too many in this minute.
    Minute(u32),
    /// Too many in this second.
    Second,
    /// Too many at once.
    Concurrent(u32),
}

/// One account in one process.
#[derive(Debug)]
pub struct Meter {
    tokens: u32,
    slots: u32,
    in_flight: u32,
    spent: i64,
    /// Of that what a question under way settles.
    asked: i64,
    credits: i64,
    rate: u32,
    most: u32,
    minute: f64,
    renewed: Instant,
    /// Somebody came in since the last settlement.
    in_use: bool,
    refused: Option<(Refusal, Instant)>,
}

impl Meter {
    /// One that holds nothing yet.
    pub fn new(now: Instant) -> Self {
        Self {
            tokens: 0,
            slots: 0,
            in_flight: 0,
            spent: 0,
            asked: 0,
            credits: 0,
            rate: 0,
            most: 0,
            minute: 0.0,
            renewed: now,
            in_use: false,
            refused: None,
        }
    }

    /// Whether a request could come in from what is held.
    pub fn has_room(&self, now: Instant) -> bool {
        self.tokens > 0 && self.in_flight < self.slots && now < self.renewed + SLOTS_HELD / 2
    }

    /// Why everybody is refused at this moment, without another question.
    pub fn refusal(&self, now: Instant) -> Option<Refusal> {
        self.refused.filter(|(_, until)| now < *until).map(|(refusal, _)| refusal)
    }

    /// Lets a request in from what is held; false when that takes a question.
    pub fn enter(&mut self, now: Instant) -> Result<bool, Refusal> {
        if let Some(refusal) = self.refusal(now) {
            return Err(refusal);
        }
        if !self.has_room(now) {
            return Ok(false);
        }
        self.tokens -= 1;
        self.in_flight += 1;
        self.in_use = true;
        Ok(true)
    }

    /// A request is over.
    pub fn leave(&mut self) {
        self.in_flight = self.in_flight.saturating_sub(1);
    }

    /// A request costs credits; says what is left.
    pub fn charge(&mut self, credits: i64) -> i64 {
        self.spent += credits;
        self.credits - self.asked - self.spent
    }

    /// A question that would let one more in. What it settles is no longer
    /// held, whatever becomes of it.
    pub fn ask_more(&mut self) -> Ask {
        let want = (self.rate / 60 / GRANT_PART).clamp(1, GRANT_MAX);
        // What was promised may be in use by the time the question is answered.
        let held = self.slots.max(self.in_flight);
        let slots = held.max(self.in_flight + 1 + self.most / AHEAD_PART);
        Ask { want, held, slots, spent: self.take_spent(), ..Ask::default() }
    }

    /// A question that settles: it charges and renews, and gives back what has
    /// not been in use of late.
    pub fn ask_less(&mut self) -> Ask {
        if !std::mem::take(&mut self.in_use) {
            let back = std::mem::take(&mut self.tokens);
            self.slots = self.in_flight;
            return Ask { back, held: self.slots, slots: self.slots, spent: self.take_spent(), ..Ask::default() };
        }
        let held = self.slots.max(self.in_flight);
        Ask { held, slots: held, spent: self.take_spent(), ..Ask::default() }
    }

    fn take_spent(&mut self) -> i64 {
        self.asked = std::mem::take(&mut self.spent);
        self.asked
    }

    /// Whether there is anything to settle.
    pub fn is_unsettled(&self, now: Instant) -> bool {
        let idle = !self.in_use && (self.tokens > 0 || self.slots > self.in_flight);
        self.spent != 0 || idle || (self.slots > 0 && now > self.renewed + RENEWAL)
    }

    /// Nothing is held, so it may be forgotten.
    pub fn is_idle(&self) -> bool {
        self.in_flight == 0 && self.tokens == 0 && self.spent == 0 && self.slots == 0
    }

    /// A question was answered.
    pub fn answered(&mut self, given: &Given, now: Instant) {
        self.tokens += given.granted;
        self.slots = given.slots;
        self.asked = 0;
        self.credits = given.credits;
        (self.rate, self.most, self.minute) = (given.rate, given.most, given.minute);
        self.renewed = now;
    }

    /// A question had no answer. It may have been carried out, so what it would
    /// have charged is not charged again: nobody pays twice.
    pub fn unanswered(&mut self) {
        self.asked = 0;
    }

    /// After a question for more that brought nothing: which limit it was.
    pub fn refuse(&mut self, now: Instant) -> Refusal {
        let refusal = if self.tokens > 0 {
            Refusal { what: Refused::Concurrent(self.most), retry_after: REFUSAL_MAX }
        } else if self.minute < 1.0 {
            let wait = (1.0 - self.minute.max(0.0)) * 60.0 / f64::from(self.rate.max(1));
            Refusal { what: Refused::Minute(self.rate), retry_after: Duration::from_secs_f64(wait) }
        } else {
            Refusal { what: Refused::Second, retry_after: REFUSAL_MAX }
        };
        self.refused = Some((refusal, now + refusal.retry_after.min(REFUSAL_HELD)));
        refusal
    }

    /// As headers tell it.
    pub fn standing(&self) -> Standing {
        let left = (self.minute + f64::from(self.tokens)).clamp(0.0, f64::from(self.rate));
        let missing = f64::from(self.rate) - left;
        let reset = (missing * 60.0 / f64::from(self.rate.max(1))).ceil();
        Standing { limit: self.rate, remaining: left.floor() as u32, reset: reset as u32 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use capx_core::domain::ids::AccountId;

    fn given(granted: u32, slots: u32, minute: f64) -> Given {
        Given { key: None, account: AccountId::new(), granted, slots, rate: 60, most: 5, minute, credits: 100 }
    }

    #[test]
    fn what_is_held_is_handed_out_once_and_settled_once() {
        let now = Instant::now();
        let mut meter = Meter::new(now);
        assert_eq!(meter.enter(now), Ok(false));
        let ask = meter.ask_more();
        assert_eq!((ask.want, ask.back, ask.held, ask.slots), (1, 0, 0, 1));
        meter.answered(&given(2, 2, 57.0), now);
        assert_eq!((meter.enter(now), meter.enter(now), meter.enter(now)), (Ok(true), Ok(true), Ok(false)));
        assert_eq!(meter.charge(5), 95);
        meter.leave();
        // Somebody was here: nothing is given back yet.
        let ask = meter.ask_less();
        assert_eq!((ask.back, ask.held, ask.slots, ask.spent), (0, 2, 2, 5));
        // While the question is out, another is charged and the last leaves.
        assert_eq!(meter.charge(1), 94);
        meter.leave();
        meter.answered(&Given { credits: 95, ..given(0, 2, 58.0) }, now);
        assert!(meter.is_unsettled(now) && !meter.is_idle());
        let ask = meter.ask_less();
        assert_eq!((ask.back, ask.held, ask.slots, ask.spent), (0, 0, 0, 1));
        meter.answered(&Given { credits: 94, ..given(0, 0, 58.0) }, now);
        assert!(!meter.is_unsettled(now) && meter.is_idle());
        assert_eq!(meter.charge(0), 94);
    }

    #[test]
    fn what_is_given_back_is_not_handed_out_while_the_answer_is_awaited() {
        let now = Instant::now();
        let mut meter = Meter::new(now);
        meter.answered(&given(5, 5, 50.0), now);
        let ask = meter.ask_less();
        assert_eq!((ask.back, ask.slots), (5, 0));
        assert_eq!(meter.enter(now), Ok(false));
        // Nor after an answer that was lost.
        meter.unanswered();
        assert_eq!(meter.enter(now), Ok(false));
    }

    #[test]
    fn a_refusal_names_its_limit_and_holds_for_a_moment() {
        let now = Instant::now();
        let mut meter = Meter::new(now);
        meter.answered(&given(0, 1, 0.25), now);
        let refusal = meter.refuse(now);
        assert_eq!(refusal.what, Refused::Minute(60));
        assert_eq!(refusal.retry_after, Duration::from_millis(750));
        assert!(meter.enter(now).is_err());
        assert_eq!(meter.enter(now + REFUSAL_MAX), Ok(false));
        meter.answered(&given(0, 1, 9.0), now);
        assert_eq!(meter.refuse(now).what, Refused::Second);
        meter.answered(&given(1, 0, 9.0), now);
        assert_eq!(meter.refuse(now).what, Refused::Concurrent(5));
    }

    #[test]
    fn slots_that_were_not_renewed_in_time_are_not_used() {
        let now = Instant::now();
        let mut meter = Meter::new(now);
        meter.answered(&given(5, 5, 9.0), now);
        assert_eq!(meter.enter(now + SLOTS_HELD), Ok(false));
    }

    #[test]
    fn headers_tell_what_nobody_has_used() {
        let now = Instant::now();
        let mut meter = Meter::new(now);
        meter.answered(&given(5, 5, 40.5), now);
        assert_eq!(meter.standing(), Standing { limit: 60, remaining: 45, reset: 15 });
    }
}
