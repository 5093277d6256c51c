//! What may be spent, and whether a call may be: caps of companies, agents, playbooks,
//! runs and steps, over days and months of the company's time zone.
//!
//! What a call costs at most is reserved before it and settled after it, so that no number
//! of calls at once passes a cap (hazard H19).

use chrono::NaiveDate;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde_json::Value;
use uuid::Uuid;

use super::money::Nanos;

/// One credit, in nano-dollars: 0.01 USD.
pub const CREDIT: i64 = 10_000_000;
/// What a call is taken to cost at most while nobody can say: the top of the documented
/// range of a call of a model, 50 credits.
pub const CALL_GUESS: Nanos = Nanos(50 * CREDIT);
/// Of so much of a cap, in percent, everybody is told.
pub const THRESHOLDS: [i16; 4] = [50, 80, 90, 100];

/// Whose spending is counted. Locks are taken in this order: parents before children.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// All of a company.
    Company,
    /// An agent.
    Agent,
    /// All that is done for a directive.
    Directive,
    /// All runs of a playbook.
    Playbook,
    /// One run.
    Run,
    /// One step of it.
    Step,
}

impl Scope {
    /// The word in tables and JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Company => "company",
            Self::Agent => "agent",
            Self::Directive => "directive",
            Self::Playbook => "playbook",
            Self::Run => "run",
            Self::Step => "step",
        }
    }
}

/// Over which time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Period {
    /// A day of the company's time zone.
    Day,
    /// A month of it.
    Month,
    /// For good.
    All,
}

impl Period {
    /// The word in tables and JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Day => "day",
            Self::Month => "month",
            Self::All => "all",
        }
    }
}

/// Where spending is counted: one row of the table of budgets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Account {
    /// Whose.
    pub scope: Scope,
    /// Which of them.
    pub id: Uuid,
    /// The step, of a run; else -1.
    pub step: i32,
    /// Over which time.
    pub period: Period,
    /// The first day of that.
    pub starts: NaiveDate,
}

/// The first day of what has no period: 1970-01-01.
fn always() -> NaiveDate {
    NaiveDate::default()
}

/// A limit of an account.
#[derive(Debug, Clone, PartialEq)]
pub struct Cap {
    /// Of which.
    pub account: Account,
    /// So much and no more.
    pub limit: Nanos,
    /// Where it is said, e.g. `config.budget_limit_daily`.
    pub rule: &'static str,
}

/// How an account stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Balance {
    /// Which.
    pub account: Account,
    /// What was spent.
    pub spent: Nanos,
    /// What calls that are under way may cost, and those of which nobody knows.
    pub reserved: Nanos,
    /// The highest threshold that was told, in percent.
    pub told: i16,
}

/// What a call may cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Estimate {
    /// Not more than this.
    AtMost(Nanos),
    /// Nobody knows: this much is taken, or what there is.
    Guess(Nanos),
}

/// Whether a call may be made.
#[derive(Debug, Clone, PartialEq)]
pub enum Admission {
    /// It may, and so much is reserved for it.
    Admitted(Nanos),
    /// Not while others are under way that may need the money.
    Busy(Cap),
    /// Not at all before the cap is raised or its time is over.
    Capped(Cap),
}

/// The day and the first day of the month at a moment, in a time zone; UTC where there is no
/// such zone.
pub fn days(now_us: i64, zone: Option<&str>) -> (NaiveDate, NaiveDate) {
    let zone = zone.and_then(|zone| TimeZone::get(zone).ok()).unwrap_or(TimeZone::UTC);
    let date = Timestamp::from_microsecond(now_us).unwrap_or_default().to_zoned(zone).date();
    let (year, month, day) =
        (i32::from(date.year()), date.month().unsigned_abs().into(), date.day().unsigned_abs().into());
    let of = |day| NaiveDate::from_ymd_opt(year, month, day).unwrap_or_default();
    (of(day), of(1))
}

/// When a period that has begun on a day is over, in microseconds since 1970.
pub fn ends_us(period: Period, starts: NaiveDate, zone: Option<&str>) -> Option<i64> {
    let next = match period {
        Period::All => return None,
        Period::Day => starts.succ_opt()?,
        Period::Month => starts.checked_add_months(chrono::Months::new(1))?,
    };
    let zone = zone.and_then(|zone| TimeZone::get(zone).ok()).unwrap_or(TimeZone::UTC);
    let date = jiff::civil::Date::strptime("%Y-%m-%d", next.to_string()).ok()?;
    Some(date.to_zoned(zone).ok()?.timestamp().as_microsecond())
}

/// Who spends, and when.
#[derive(Debug, Clone, Copy)]
pub struct Spender {
    /// Whose company.
    pub company: Uuid,
    /// Which agent.
    pub agent: Option<Uuid>,
    /// For which directive: its task.
    pub directive: Option<Uuid>,
    /// By which playbook.
    pub playbook: Uuid,
    /// In which run.
    pub run: Uuid,
    /// At which step.
    pub step: i32,
    /// Today, in the company's time zone.
    pub day: NaiveDate,
    /// The first day of the month.
    pub month: NaiveDate,
}

impl Spender {
    /// Everything that counts what it spends, in the order of locks.
    pub fn accounts(&self) -> Vec<Account> {
        let of = |scope, id, period, starts| Account { scope, id, step: -1, period, starts };
        let mut accounts = vec![
            of(Scope::Company, self.company, Period::Day, self.day),
            of(Scope::Company, self.company, Period::Month, self.month),
        ];
        if let Some(agent) = self.agent {
            accounts.push(of(Scope::Agent, agent, Period::Day, self.day));
            accounts.push(of(Scope::Agent, agent, Period::Month, self.month));
        }
        if let Some(directive) = self.directive {
            accounts.push(of(Scope::Directive, directive, Period::All, always()));
        }
        accounts.push(of(Scope::Playbook, self.playbook, Period::Month, self.month));
        accounts.push(of(Scope::Run, self.run, Period::All, always()));
        accounts.push(Account { step: self.step, ..of(Scope::Step, self.run, Period::All, always()) });
        accounts
    }
}

/// What is said about limits.
#[derive(Debug, Clone, Copy, Default)]
pub struct Said<'a> {
    /// The company's `config`.
    pub config: Option<&'a Value>,
    /// Its `governance`.
    pub governance: Option<&'a Value>,
    /// The agent's `budget`, in credits a month.
    pub agent_budget: Option<i64>,
    /// The agent's `config`.
    pub agent_config: Option<&'a Value>,
    /// The directive's `budget`.
    pub directive: Option<Nanos>,
    /// The playbook's `execution.spend_cap`, in USD a month.
    pub playbook_month: Option<Nanos>,
    /// The playbook's `budget` for one run.
    pub run: Option<Nanos>,
    /// The step's `budget`.
    pub step: Option<Nanos>,
}

fn usd(value: Option<&Value>) -> Option<Nanos> {
    let usd = value?.as_f64().filter(|usd| usd.is_finite() && *usd >= 0.0)?;
    // Larger than anything that is ever spent, and no overflow.
    Some(Nanos((usd.min(9e9) * 1e9).round() as i64))
}

/// Credits in nano-dollars.
pub fn credits(credits: i64) -> Nanos {
    Nanos(credits.max(0).saturating_mul(CREDIT))
}

impl Said<'_> {
    /// Every limit that holds for a spender; the lowest wins, since all must hold.
    pub fn caps(&self, spender: &Spender) -> Vec<Cap> {
        // A policy stands at either place.
        let policies = [self.governance, self.config.and_then(|config| config.get("governance"))];
        let policy = |path: &str| policies.iter().flatten().find_map(|policy| usd(policy.pointer(path)));
        let limits = [
            (
                Scope::Company,
                Period::Day,
                usd(self.config.and_then(|c| c.get("budget_limit_daily"))),
                "the company's config.budget_limit_daily",
            ),
            (
                Scope::Company,
                Period::Day,
                policy("/spend_caps/per_company/daily"),
                "governance.spend_caps.per_company.daily",
            ),
            (Scope::Company, Period::Month, policy("/spend_cap"), "governance.spend_cap"),
            (
                Scope::Company,
                Period::Month,
                policy("/spend_caps/per_company/monthly"),
                "governance.spend_caps.per_company.monthly",
            ),
            (
                Scope::Agent,
                Period::Day,
                usd(self.agent_config.and_then(|c| c.get("budget_limit_daily"))),
                "the agent's config.budget_limit_daily",
            ),
            (Scope::Agent, Period::Day, policy("/spend_caps/per_agent/daily"), "governance.spend_caps.per_agent.daily"),
            (Scope::Agent, Period::Month, self.agent_budget.map(credits), "the agent's budget"),
            (
                Scope::Agent,
                Period::Month,
                policy("/spend_caps/per_agent/monthly"),
                "governance.spend_caps.per_agent.monthly",
            ),
            (Scope::Directive, Period::All, self.directive, "the directive's budget"),
            (Scope::Playbook, Period::Month, self.playbook_month, "the playbook's execution.spend_cap"),
            (Scope::Run, Period::All, self.run, "the playbook's budget"),
            (Scope::Step, Period::All, self.step, "the step's budget"),
        ];
        let accounts = spender.accounts();
        let account =
            |scope, period| accounts.iter().find(|account| (account.scope, account.period) == (scope, period));
        let cap = |(scope, period, limit, rule): (_, _, Option<Nanos>, _)| {
            Some(Cap { account: *account(scope, period)?, limit: limit?, rule })
        };
        limits.into_iter().filter_map(cap).collect()
    }
}

/// Decides about a call by the caps, and by how their accounts stand under their locks.
pub fn admit(caps: &[Cap], balances: &[Balance], estimate: Estimate) -> Admission {
    let of = |cap: &Cap| balances.iter().find(|balance| balance.account == cap.account);
    let mut wanted = match estimate {
        Estimate::AtMost(most) | Estimate::Guess(most) => most.0,
    };
    let mut busy = None;
    for cap in caps {
        let (spent, reserved) = of(cap).map_or((0, 0), |balance| (balance.spent.0, balance.reserved.0));
        let (unspent, left) =
            (cap.limit.0.saturating_sub(spent), cap.limit.0.saturating_sub(spent).saturating_sub(reserved));
        let enough = match estimate {
            // Where nothing is left, nothing is asked for, whatever it is said to cost.
            Estimate::AtMost(most) => (unspent > 0 && unspent >= most.0, left >= most.0),
            Estimate::Guess(_) => (unspent > 0, left > 0),
        };
        match enough {
            (false, _) => return Admission::Capped(cap.clone()),
            (true, false) => busy = busy.or(Some(cap)),
            (true, true) => wanted = wanted.min(left),
        }
    }
    match busy {
        Some(cap) => Admission::Busy(cap.clone()),
        None => Admission::Admitted(Nanos(wanted)),
    }
}

/// The thresholds of a cap that spending has just passed, in percent, lowest first.
pub fn passed(cap: &Cap, spent: Nanos, told: i16) -> impl Iterator<Item = i16> {
    let (spent, limit) = (i128::from(spent.0), i128::from(cap.limit.0));
    THRESHOLDS
        .into_iter()
        .filter(move |percent| *percent > told && spent * 100 >= limit * i128::from(*percent) && spent > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn spender() -> Spender {
        let (day, month) = days(1_780_000_000_000_000, Some("America/New_York"));
        let id = Uuid::from_u128;
        Spender {
            company: id(1),
            agent: Some(id(2)),
            directive: None,
            playbook: id(3),
            run: id(4),
            step: 5,
            day,
            month,
        }
    }

    fn cap(limit: i64) -> Cap {
        Cap { account: spender().accounts()[0], limit: Nanos(limit), rule: "a rule" }
    }

    fn balance(spent: i64, reserved: i64) -> Balance {
        Balance { account: spender().accounts()[0], spent: Nanos(spent), reserved: Nanos(reserved), told: 0 }
    }

    #[test]
    fn days_are_those_of_the_zone() {
        // 2026-06-01T02:00Z is still May in New York.
        let at = 1_780_279_200_000_000;
        let day = |text: &str| text.parse::<NaiveDate>().expect("a day");
        assert_eq!(days(at, None), (day("2026-06-01"), day("2026-06-01")));
        assert_eq!(days(at, Some("America/New_York")), (day("2026-05-31"), day("2026-05-01")));
        assert_eq!(days(at, Some("no/where")), days(at, None));
        let end = ends_us(Period::Month, day("2026-05-01"), Some("America/New_York")).expect("an end");
        assert_eq!(end, 1_780_286_400_000_000, "midnight there is 04:00Z");
        assert_eq!(ends_us(Period::Day, day("2026-12-31"), None).map(|us| days(us, None).0), Some(day("2027-01-01")));
        assert_eq!(ends_us(Period::All, always(), None), None);
    }

    #[test]
    fn every_place_that_names_a_limit_counts() {
        let config =
            json!({"budget_limit_daily": 20, "governance": {"spend_caps": {"per_agent": {"daily": 5, "monthly": 50}}}});
        let governance = json!({"spend_cap": 500, "spend_caps": {"per_company": {"daily": 200, "monthly": 2000}}});
        let agent = json!({"budget_limit_daily": 3.5});
        let said = Said {
            config: Some(&config),
            governance: Some(&governance),
            agent_budget: Some(200),
            agent_config: Some(&agent),
            step: Some(Nanos(7)),
            ..Said::default()
        };
        let caps = said.caps(&spender());
        let usd: Vec<_> =
            caps.iter().map(|cap| (cap.account.scope.as_str(), cap.account.period.as_str(), cap.limit.0)).collect();
        let n = 1_000_000_000;
        assert_eq!(
            usd,
            [
                ("company", "day", 20 * n),
                ("company", "day", 200 * n),
                ("company", "month", 500 * n),
                ("company", "month", 2000 * n),
                ("agent", "day", 3_500_000_000),
                ("agent", "day", 5 * n),
                ("agent", "month", 2 * n),
                ("agent", "month", 50 * n),
                ("step", "all", 7),
            ]
        );
        assert!(Said::default().caps(&spender()).is_empty());
    }

    #[test]
    fn a_call_waits_for_money_that_may_come_back_and_not_for_what_is_gone() {
        let at_most = |n| Estimate::AtMost(Nanos(n));
        let decide = |spent, reserved, estimate| admit(&[cap(100)], &[balance(spent, reserved)], estimate);
        assert_eq!(decide(0, 0, at_most(100)), Admission::Admitted(Nanos(100)));
        assert_eq!(decide(60, 0, at_most(50)), Admission::Capped(cap(100)));
        assert_eq!(decide(40, 20, at_most(50)), Admission::Busy(cap(100)));
        assert_eq!(decide(99, 1, at_most(0)), Admission::Admitted(Nanos(0)));
        assert_eq!(decide(100, 0, at_most(0)), Admission::Capped(cap(100)), "said to cost nothing");
        assert_eq!(decide(60, 10, Estimate::Guess(Nanos(50))), Admission::Admitted(Nanos(30)));
        assert_eq!(decide(60, 40, Estimate::Guess(Nanos(50))), Admission::Busy(cap(100)));
        assert_eq!(decide(100, 0, Estimate::Guess(Nanos(50))), Admission::Capped(cap(100)));
        assert_eq!(admit(&[], &[], Estimate::Guess(Nanos(50))), Admission::Admitted(Nanos(50)));
    }

    #[test]
    fn each_threshold_is_told_once() {
        assert_eq!(passed(&cap(100), Nanos(85), 0).collect::<Vec<_>>(), [50, 80]);
        assert_eq!(passed(&cap(100), Nanos(85), 80).count(), 0);
        assert_eq!(passed(&cap(100), Nanos(250), 80).collect::<Vec<_>>(), [90, 100]);
        assert_eq!(passed(&cap(0), Nanos(0), 0).count(), 0);
    }

    proptest! {
        // However calls come and go, what is spent never passes the cap.
        #[test]
        fn no_order_of_calls_overspends(limit in 1i64..1_000, calls in prop::collection::vec((0usize..4, 0i64..200, 0u8..=100), 0..200)) {
            let (caps, mut now) = ([cap(limit)], balance(0, 0));
            let mut open: Vec<(i64, i64)> = Vec::new();
            for (what, most, share) in calls {
                if what == 0 && !open.is_empty() {
                    let (reserved, cost) = open.remove(0);
                    now.reserved.0 -= reserved;
                    now.spent.0 += cost;
                } else if let Admission::Admitted(Nanos(reserved)) = admit(&caps, &[now], Estimate::AtMost(Nanos(most))) {
                    now.reserved.0 += reserved;
                    open.push((reserved, most * i64::from(share) / 100));
                }
                prop_assert!(now.spent.0 + now.reserved.0 <= limit);
            }
        }
    }
}
