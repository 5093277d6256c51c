//! Schedules against an oracle that goes through every minute of the years and
//! knows nothing of how the product finds its fires.
//!
//! CI takes a part of it; all of it (400 expressions, 40 zones, 20 years, and
//! 1,000,000 fires by schedulers that die):
//! `CAPX_CRON=full cargo test --release -p capx-core --test cron -- --nocapture`
#![allow(clippy::expect_used, clippy::print_stdout, missing_docs, reason = "a test that cannot go on stops")]

use capx_core::domain::schedule::{CATCH_UP_MAX, CatchUp, Gap, Overlap, Schedule, ScheduleSpec};
use jiff::Timestamp;
use jiff::civil::Date;
use jiff::tz::TimeZone;

/// With half an hour of summer, a lost day, winter time as the exception, a
/// month's pause, changes at midnight, and none at all.
const ZONES: [&str; 40] = [
    "Australia/Lord_Howe",
    "Pacific/Apia",
    "Europe/Dublin",
    "Africa/Casablanca",
    "America/Sao_Paulo",
    "Europe/Berlin",
    "America/New_York",
    "UTC",
    "Asia/Kathmandu",
    "Pacific/Chatham",
    "America/St_Johns",
    "Asia/Gaza",
    "Africa/Cairo",
    "Asia/Beirut",
    "Asia/Tehran",
    "America/Havana",
    "America/Asuncion",
    "America/Santiago",
    "Pacific/Easter",
    "Antarctica/Troll",
    "Pacific/Fakaofo",
    "Pacific/Kiritimati",
    "Asia/Kolkata",
    "Asia/Tokyo",
    "Asia/Pyongyang",
    "America/Caracas",
    "Europe/Istanbul",
    "Europe/Moscow",
    "Europe/Volgograd",
    "America/Los_Angeles",
    "America/Phoenix",
    "Pacific/Auckland",
    "Africa/Juba",
    "Africa/Sao_Tome",
    "Atlantic/Azores",
    "America/Nuuk",
    "Asia/Damascus",
    "Pacific/Norfolk",
    "Pacific/Bougainville",
    "Asia/Amman",
];

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }

    fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }
}

/// One field: how it is written, and which values it takes.
struct Field {
    text: String,
    takes: u64,
    restricted: bool,
}

const MONTHS: [&str; 12] = ["JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"];
const DAYS: [&str; 7] = ["SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"];

fn field(random: &mut Random, low: u64, high: u64, names: &[&str], open: u64) -> Field {
    let bits = |from: u64, to: u64, step: usize| (from..=to).step_by(step).fold(0u64, |bits, n| bits | 1 << n);
    if random.below(10) < open {
        return Field { text: "*".into(), takes: bits(low, high, 1), restricted: false };
    }
    let name =
        |n: u64| names.get(usize::try_from(n - low).expect("small")).map_or_else(|| n.to_string(), |n| (*n).to_owned());
    let (mut text, mut takes) = (Vec::new(), 0);
    for _ in 0..random.between(1, 3) {
        let from = random.between(low, high);
        let to = random.between(from, high);
        let step = random.between(1, 6);
        let steps = usize::try_from(step).expect("small");
        match random.below(4) {
            0 | 1 => {
                text.push(if random.below(2) == 0 { name(from) } else { from.to_string() });
                takes |= 1 << from;
            }
            2 => {
                text.push(format!("{from}-{to}"));
                takes |= bits(from, to, 1);
            }
            _ => {
                text.push(format!("{from}-{to}/{step}"));
                takes |= bits(from, to, steps);
            }
        }
    }
    Field { text: text.join(","), takes, restricted: true }
}

struct Expression {
    text: String,
    minutes: u64,
    hours: u64,
    days: u64,
    months: u64,
    weekdays: u64,
    /// Both kinds of day are restricted: either will do.
    either: bool,
    every_hour: bool,
}

fn expression(random: &mut Random) -> Expression {
    let minutes = field(random, 0, 59, &[], 1);
    let hours = field(random, 0, 23, &[], 3);
    let days = field(random, 1, 31, &[], 6);
    let months = field(random, 1, 12, &MONTHS, 7);
    let weekdays = field(random, 0, 6, &DAYS, 6);
    let text = [&minutes, &hours, &days, &months, &weekdays].map(|field| field.text.as_str()).join(" ");
    Expression {
        text,
        minutes: minutes.takes,
        hours: hours.takes,
        days: days.takes,
        months: months.takes,
        weekdays: weekdays.takes,
        either: days.restricted && weekdays.restricted,
        every_hour: !hours.restricted,
    }
}

impl Expression {
    fn takes_day(&self, date: Date) -> bool {
        let has = |bits: u64, n: i8| bits & (1 << n) != 0;
        let (day, weekday) = (has(self.days, date.day()), has(self.weekdays, date.weekday().to_sunday_zero_offset()));
        has(self.months, date.month()) && if self.either { day || weekday } else { day && weekday }
    }
}

/// A zone's clock, minute by minute of UTC: the minutes of local time since 1970.
fn clock(zone: &TimeZone, from: i64, to: i64) -> Vec<i64> {
    let local = |minute: i64| {
        let at = Timestamp::from_second(minute * 60).expect("a time");
        minute + i64::from(zone.to_offset(at).seconds()) / 60
    };
    (from..to).map(local).collect()
}

/// Every minute of UTC at which it fires.
fn oracle(expression: &Expression, gap: Gap, overlap: Option<Overlap>, from: i64, clock: &[i64]) -> Vec<i64> {
    let epoch = Date::constant(1970, 1, 1);
    let twice = overlap.map_or(expression.every_hour, |overlap| overlap == Overlap::Both);
    let mut known = (i64::MIN, false);
    let mut takes = |local: i64| {
        let (day, minute) = (local.div_euclid(1440), local.rem_euclid(1440));
        if known.0 != day {
            let date = epoch.checked_add(jiff::Span::new().days(day)).expect("a day");
            known = (day, expression.takes_day(date));
        }
        known.1 && expression.hours & (1 << (minute / 60)) != 0 && expression.minutes & (1 << (minute % 60)) != 0
    };
    let mut fires = Vec::new();
    let mut latest = clock[0] - 1;
    for (utc, local) in (from..).zip(clock) {
        let repeated = *local <= latest;
        let mut fire = takes(*local) && (!repeated || twice);
        if *local > latest + 1 && gap == Gap::Shift {
            fire |= (latest + 1..*local).any(&mut takes);
        }
        if fire {
            fires.push(utc);
        }
        latest = latest.max(*local);
    }
    fires
}

/// Where a schedule is asked: everywhere, or around the changes of a zone's clock
/// where it fires too often for that.
fn windows(fires: &[i64], from: i64, clock: &[i64]) -> Vec<(i64, i64)> {
    let end = from + i64::try_from(clock.len()).expect("small");
    if fires.len() < clock.len() / 100 {
        return vec![(from, end)];
    }
    let changes = clock.windows(2).zip(from..).filter(|(pair, _)| pair[1] != pair[0] + 1).map(|(_, at)| at);
    let around = changes.map(|at| ((at - 2 * 1440).max(from), (at + 2 * 1440).min(end)));
    std::iter::once((from, (from + 3 * 1440).min(end))).chain(around).collect()
}

struct Scale {
    expressions: u64,
    zones: usize,
    years: i16,
}

/// Compares the expressions of one seed; gives how many fires were compared.
fn compare(zone_name: &str, scale: &Scale) -> u64 {
    let minute = |year: i16| {
        Date::new(year, 1, 1).expect("a year").to_zoned(TimeZone::UTC).expect("a time").timestamp().as_second() / 60
    };
    let first = if scale.years < 20 { 2011 } else { 2010 };
    let (from, to) = (minute(first), minute(first + scale.years));
    let zone = TimeZone::get(zone_name).expect(zone_name);
    let clock = clock(&zone, from, to);
    let mut random = Random(7);
    let mut compared = 0;
    for _ in 0..scale.expressions {
        let expression = expression(&mut random);
        let gap = if random.below(3) == 0 { Gap::Skip } else { Gap::Shift };
        let overlap =
            [None, Some(Overlap::First), Some(Overlap::Both)][usize::try_from(random.below(3)).expect("small")];
        let spec =
            ScheduleSpec { timezone: Some(zone_name.into()), gap, overlap, ..ScheduleSpec::new(&expression.text) };
        // Drawn at random, some never fire.
        let Ok(schedule) = Schedule::read(&spec) else { continue };
        let fires = oracle(&expression, gap, overlap, from, &clock);
        for (begin, end) in windows(&fires, from, &clock) {
            let begins = fires.partition_point(|fire| *fire <= begin);
            let ends = fires.partition_point(|fire| *fire < end);
            let mut at = Timestamp::from_second(begin * 60).expect("a time");
            for wanted in &fires[begins..ends.max(begins)] {
                let next = schedule.next_after(at).map(Timestamp::as_second);
                let told = |second: i64| Timestamp::from_second(second).expect("a time");
                assert_eq!(
                    next.map(told),
                    Some(told(wanted * 60)),
                    "`{}` in {zone_name} ({gap:?}, {overlap:?}) after {at}",
                    expression.text
                );
                at = told(wanted * 60);
                compared += 1;
            }
            if let Some(beyond) = schedule.next_after(at) {
                assert!(
                    ends == fires.len() || beyond.as_second() >= end * 60,
                    "`{}` in {zone_name} fires at {beyond}, too",
                    expression.text
                );
            }
        }
    }
    compared
}

#[test]
fn schedules_fire_as_an_oracle_says_minute_by_minute() {
    let scale = match std::env::var("CAPX_CRON").as_deref() {
        Ok("full") => Scale { expressions: 400, zones: ZONES.len(), years: 20 },
        _ => Scale { expressions: 40, zones: 6, years: 2 },
    };
    let zones = &ZONES[..scale.zones];
    let (left, right) = zones.split_at(zones.len() / 2);
    let half = |zones: &[&str]| -> u64 {
        let each = zones.iter().map(|zone| {
            let compared = compare(zone, &scale);
            println!("{zone}: {compared} fires");
            compared
        });
        each.sum()
    };
    let compared = std::thread::scope(|threads| {
        let other = threads.spawn(|| half(left));
        half(right) + other.join().expect("its half")
    });
    println!("{compared} fires compared");
    assert!(compared > 50_000, "{compared}");
}

/// The job of a schedule and what was started, as the database holds them.
struct Store {
    next: Timestamp,
    epoch: u64,
    leased_until: Option<Timestamp>,
    started: Vec<Timestamp>,
}

impl Store {
    /// One transaction, fenced by the lease under which it was begun.
    fn commit(&mut self, schedule: &Schedule, epoch: u64, now: Timestamp) {
        if epoch != self.epoch {
            return;
        }
        let (due, next) = schedule.reach(self.next, now);
        self.started.extend(due);
        (self.next, self.leased_until) = (next.expect("it goes on"), None);
        self.epoch += 1;
    }

    /// Takes the job, if it is due and nobody's.
    fn claim(&mut self, now: Timestamp) -> Option<u64> {
        if self.next > now || self.leased_until.is_some_and(|until| until > now) {
            return None;
        }
        self.epoch += 1;
        self.leased_until = Some(later(now, 60));
        Some(self.epoch)
    }
}

fn later(at: Timestamp, seconds: u64) -> Timestamp {
    at.checked_add(jiff::SignedDuration::from_secs(i64::try_from(seconds).expect("small"))).expect("a time")
}

/// Three schedulers that die before and after their commits, stall until others
/// have taken over, and come back; gives what they started, and how many died.
fn carry_out(schedule: &Schedule, random: &mut Random, from: Timestamp, to: Timestamp) -> (Vec<Timestamp>, u64) {
    let next = schedule.next_after(from).expect("it fires");
    let mut store = Store { next, epoch: 0, leased_until: None, started: Vec::new() };
    let (mut hands, mut now, mut deaths) = ([None; 3], from, 0);
    while store.next <= to {
        let hand = &mut hands[usize::try_from(random.below(3)).expect("small")];
        let Some(epoch) = *hand else {
            *hand = store.claim(now);
            if hand.is_none() {
                // Nothing is due, or another has it: time goes by.
                let until = store.leased_until.map_or(store.next, |until| until.max(store.next));
                now = later(now.max(until), random.below(240));
            }
            continue;
        };
        match random.below(4) {
            0 => {
                (*hand, deaths) = (None, deaths + 1);
            }
            1 => now = later(now, random.below(120)),
            2 => {
                store.commit(schedule, epoch, now);
                // Its answer is lost, and it asks again.
                store.commit(schedule, epoch, now);
                (*hand, deaths) = (None, deaths + 1);
            }
            _ => {
                store.commit(schedule, epoch, now);
                *hand = None;
            }
        }
    }
    store.started.retain(|fire| *fire <= to);
    (store.started, deaths)
}

#[test]
fn schedulers_that_die_start_each_fire_once() {
    let wanted = if std::env::var("CAPX_CRON").as_deref() == Ok("full") { 1_000_000 } else { 20_000 };
    let mut random = Random(11);
    let (mut pairs, mut deaths, mut schedules) = (0, 0, 0);
    while pairs < wanted {
        let zone_name = ZONES[usize::try_from(random.below(40)).expect("small")];
        let zone = TimeZone::get(zone_name).expect(zone_name);
        let expression = expression(&mut random);
        let spec = ScheduleSpec {
            timezone: Some(zone_name.into()),
            catch_up: CatchUp::All(CATCH_UP_MAX),
            ..ScheduleSpec::new(&expression.text)
        };
        let Ok(schedule) = Schedule::read(&spec) else { continue };
        // A year from somewhere on, or 2,000 fires.
        let begin = i64::try_from(random.between(21_038_400, 28_927_440)).expect("small");
        let clock = clock(&zone, begin, begin + 366 * 1440);
        let mut fires = oracle(&expression, Gap::Shift, None, begin, &clock);
        // Whether the first minutes are new or repeated, the oracle cannot know.
        let from = begin + 1440;
        fires.retain(|fire| *fire > from);
        fires.truncate(2000);
        let Some(last) = fires.last() else { continue };
        let at = |minute: i64| Timestamp::from_second(minute * 60).expect("a time");
        let (started, died) = carry_out(&schedule, &mut random, at(from), at(*last));
        let fires: Vec<Timestamp> = fires.iter().map(|fire| at(*fire)).collect();
        assert_eq!(started, fires, "`{}` in {zone_name} from {}", expression.text, at(from));
        (pairs, deaths, schedules) = (pairs + fires.len(), deaths + died, schedules + 1);
    }
    println!("{pairs} fires of {schedules} schedules, each once, over {deaths} deaths");
    assert!(deaths > 1_000, "{deaths}");
}
