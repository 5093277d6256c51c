//! Costs: by category and agent, by day, and what they will be.

use std::collections::BTreeMap;

use axum::extract::State;
use axum::response::Response;
use capx_core::domain::forecast::{WINDOW_DAYS, forecast};
use capx_core::domain::ids::{AgentId, CompanyId};
use capx_core::domain::money::Nanos;
use capx_core::store::usage::{self, Spent};
use capx_core::store::{agents as stored_agents, tenants};
use chrono::{DateTime, Datelike, Days, Duration, NaiveDate, NaiveTime, TimeZone, Timelike, Utc};
use serde::{Deserialize, Serialize};
use sqlx::PgConnection;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::routes;
use uuid::Uuid;

use super::Routes;
use super::agents;
use crate::api::auth::{Caller, Scope};
use crate::api::body::{Path, Query};
use crate::api::period;
use crate::api::reply::{All, One, Time};
use crate::api::{ApiError, Shared};

/// Days back, when nothing else is asked for.
const DAYS: u64 = 30;
/// The most days of one answer by day.
const DAYS_MAX: i64 = 400;
/// Companies that one answer adds up, the newest.
const COMPANIES_MAX: i64 = 10_000;

pub(in crate::api) fn routes(routes: Routes) -> Routes {
    routes
        .with(Scope::ActivityRead, 1, routes!(of_company))
        .with(Scope::ActivityRead, 1, routes!(daily))
        .with(Scope::ActivityRead, 1, routes!(forecasted))
        .with(Scope::AgentsRead, 1, routes!(of_agent))
        .with(Scope::ActivityRead, 1, routes!(of_account))
}

/// A range of times.
#[derive(Debug, Serialize, ToSchema)]
struct Range {
    since: Time,
    until: Time,
}

/// By category, in USD.
#[derive(Debug, Default, Serialize, ToSchema)]
struct Breakdown {
    /// Use of models, heartbeats and rubrics with it.
    inference: f64,
    /// Calls of others' services, and computing.
    tools: f64,
    storage: f64,
}

/// Sums of nano-dollars, shown at the end.
#[derive(Debug, Default, Clone, Copy)]
struct Sums {
    inference: i64,
    tools: i64,
    storage: i64,
}

impl Sums {
    fn add(&mut self, category: &str, nanos: Nanos) {
        let sum = match category {
            "tools" => &mut self.tools,
            "storage" => &mut self.storage,
            _ => &mut self.inference,
        };
        *sum = sum.saturating_add(nanos.0);
    }

    fn total(self) -> Nanos {
        Nanos(self.inference.saturating_add(self.tools).saturating_add(self.storage))
    }

    fn show(self) -> Breakdown {
        Breakdown {
            inference: Nanos(self.inference).to_usd(),
            tools: Nanos(self.tools).to_usd(),
            storage: Nanos(self.storage).to_usd(),
        }
    }
}

/// What an agent has spent.
#[derive(Debug, Serialize, ToSchema)]
struct AgentTotal {
    /// Null for what playbooks have spent by tools, without an agent.
    #[schema(required, value_type = Option<String>)]
    agent_id: Option<AgentId>,
    #[schema(required)]
    role: Option<String>,
    /// In USD.
    total: f64,
}

/// What a company has spent.
#[derive(Debug, Serialize, ToSchema)]
struct CompanyCosts {
    #[schema(value_type = String)]
    company_id: CompanyId,
    period: Range,
    breakdown: Breakdown,
    by_agent: Vec<AgentTotal>,
    /// In USD.
    total: f64,
    /// What calls that are under way hold, in USD: it is not in the total yet.
    reserved: f64,
    /// What of the total was booked at its worst, in USD, since nobody heard of the call's answer.
    unheard: f64,
}

/// What an account has spent.
#[derive(Debug, Serialize, ToSchema)]
struct AccountCosts {
    period: Range,
    breakdown: Breakdown,
    by_agent: Vec<AgentTotal>,
    by_company: Vec<CompanyTotal>,
    /// In USD.
    total: f64,
}

/// What a company has spent.
#[derive(Debug, Serialize, ToSchema)]
struct CompanyTotal {
    #[schema(value_type = String)]
    company_id: CompanyId,
    /// In USD.
    total: f64,
}

/// What an agent has spent.
#[derive(Debug, Serialize, ToSchema)]
struct AgentCosts {
    #[schema(value_type = String)]
    agent_id: AgentId,
    period: Range,
    breakdown: Breakdown,
    /// In USD.
    total: f64,
    /// Heartbeats in the period.
    heartbeat_count: i64,
    /// In USD; null without heartbeats.
    #[schema(required)]
    avg_cost_per_heartbeat: Option<f64>,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct RangeQuery {
    /// From this date or time (ISO 8601) on; by default 30 days ago.
    since: Option<String>,
    /// To the end of this date, or to this time; by default today.
    until: Option<String>,
}

impl RangeQuery {
    /// The range, and the first instant behind it.
    fn read(&self, now: DateTime<Utc>) -> Result<(Range, DateTime<Utc>), ApiError> {
        let (since, until) = period::range(self.since.as_deref(), self.until.as_deref())?;
        let today = now.date_naive();
        let until =
            until.unwrap_or_else(|| Utc.from_utc_datetime(&today.and_time(NaiveTime::MIN)) + Duration::seconds(86_399));
        let since = since.unwrap_or_else(|| {
            let day = until.date_naive().checked_sub_days(Days::new(DAYS)).unwrap_or(NaiveDate::MIN);
            Utc.from_utc_datetime(&day.and_time(NaiveTime::MIN))
        });
        if since > until {
            return Err(ApiError::field("since", "must not be after `until`"));
        }
        let end = until.with_nanosecond(0).unwrap_or(until) + Duration::seconds(1);
        Ok((Range { since: Time(since), until: Time(until) }, end))
    }
}

async fn by_agent(tx: &mut PgConnection, spent: &[Spent]) -> Result<Vec<AgentTotal>, ApiError> {
    let mut totals: BTreeMap<(CompanyId, Option<AgentId>), i64> = BTreeMap::new();
    for one in spent {
        let total = totals.entry((one.company, one.agent)).or_default();
        *total = total.saturating_add(one.nanos.0);
    }
    let known: Vec<_> = totals.keys().filter_map(|(company, agent)| Some((*company, (*agent)?))).collect();
    let roles: BTreeMap<AgentId, String> = stored_agents::roles(tx, &known).await?.into_iter().collect();
    let mut totals: Vec<_> = totals.into_iter().collect();
    totals.sort_by_key(|(_, nanos)| std::cmp::Reverse(*nanos));
    Ok(totals
        .into_iter()
        .map(|((_, agent_id), nanos)| AgentTotal {
            agent_id,
            role: agent_id.and_then(|agent| roles.get(&agent).cloned()),
            total: Nanos(nanos).to_usd(),
        })
        .collect())
}

fn sums(spent: &[Spent]) -> Sums {
    let mut sums = Sums::default();
    for one in spent {
        sums.add(&one.category, one.nanos);
    }
    sums
}

/// A company's costs
///
/// By category and by agent.
#[utoipa::path(get, path = "/companies/{company}/costs", tag = "Costs",
    params(("company" = String, Path, description = "`co_…`"), RangeQuery),
    responses((status = 200, description = "What was spent.", body = One<CompanyCosts>)))]
async fn of_company(
    State(state): Shared,
    caller: Caller,
    Path(company): Path<String>,
    Query(query): Query<RangeQuery>,
) -> Result<Response, ApiError> {
    let mut tx = caller.read(&state).await?;
    let company_id = caller.company_id(&mut tx, &company).await?;
    let (period, end) = query.read(usage::now(&mut tx).await?)?;
    let spent = usage::spent(&mut tx, &[company_id.0], None, period.since.0, end).await?;
    let sums = sums(&spent);
    let by_agent = by_agent(&mut tx, &spent).await?;
    let total = sums.total().to_usd();
    let open = usage::open(&mut tx, company_id, period.since.0, end).await?;
    let (reserved, unheard) = (open.reserved.to_usd(), open.unheard.to_usd());
    caller.figures(CompanyCosts { company_id, period, breakdown: sums.show(), by_agent, total, reserved, unheard })
}

/// All costs
///
/// Of the companies that the key may see, by category, company and agent.
#[utoipa::path(get, path = "/costs", tag = "Costs", params(RangeQuery),
    responses((status = 200, description = "What was spent.", body = One<AccountCosts>)))]
async fn of_account(
    State(state): Shared,
    caller: Caller,
    Query(query): Query<RangeQuery>,
) -> Result<Response, ApiError> {
    let mut tx = caller.read(&state).await?;
    let (period, end) = query.read(usage::now(&mut tx).await?)?;
    let companies: Vec<Uuid> = tenants::company_ids(&mut tx, caller.account, caller.company, COMPANIES_MAX).await?;
    let spent = usage::spent(&mut tx, &companies, None, period.since.0, end).await?;
    let mut by_company: BTreeMap<CompanyId, i64> = BTreeMap::new();
    for one in &spent {
        let total = by_company.entry(one.company).or_default();
        *total = total.saturating_add(one.nanos.0);
    }
    let by_company =
        by_company.into_iter().map(|(company_id, nanos)| CompanyTotal { company_id, total: Nanos(nanos).to_usd() });
    let sums = sums(&spent);
    let total = sums.total().to_usd();
    let by_agent = by_agent(&mut tx, &spent).await?;
    caller.figures(AccountCosts { period, breakdown: sums.show(), by_agent, by_company: by_company.collect(), total })
}

/// An agent's costs
#[utoipa::path(get, path = "/companies/{company}/agents/{agent}/costs", tag = "Costs",
    params(("company" = String, Path, description = "`co_…`"), ("agent" = String, Path, description = "`ag_…` or a role"), RangeQuery),
    responses((status = 200, description = "What it has spent.", body = One<AgentCosts>)))]
async fn of_agent(
    State(state): Shared,
    caller: Caller,
    Path((company, agent)): Path<(String, String)>,
    Query(query): Query<RangeQuery>,
) -> Result<Response, ApiError> {
    let mut tx = caller.read(&state).await?;
    let company = caller.company_id(&mut tx, &company).await?;
    let agent_id = agents::find(&mut tx, company, &agent).await?.agent;
    let (period, end) = query.read(usage::now(&mut tx).await?)?;
    let spent = usage::spent(&mut tx, &[company.0], Some(agent_id), period.since.0, end).await?;
    let heartbeat_count = capx_core::store::events::heartbeats(&mut tx, company, agent_id, period.since.0, end).await?;
    let sums = sums(&spent);
    let total = sums.total().to_usd();
    // To a tenth of a cent, as shown.
    let avg = (heartbeat_count > 0).then(|| (total / heartbeat_count as f64 * 1e3).round() / 1e3);
    caller.figures(AgentCosts {
        agent_id,
        period,
        breakdown: sums.show(),
        total,
        heartbeat_count,
        avg_cost_per_heartbeat: avg,
    })
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct DailyQuery {
    /// The first day; by default 30 days ago.
    since: Option<String>,
    /// The last day; by default today.
    until: Option<String>,
    /// IANA time zone whose days are meant; by default UTC.
    timezone: Option<String>,
}

/// A day's costs.
#[derive(Debug, Serialize, ToSchema)]
struct Day {
    /// The calendar day in the time zone.
    #[schema(value_type = String, format = Date)]
    date: NaiveDate,
    /// In USD.
    total: f64,
    breakdown: Breakdown,
}

/// Days of a time zone.
struct Zone {
    zone: jiff::tz::TimeZone,
}

impl Zone {
    fn named(name: Option<&str>) -> Result<Self, ApiError> {
        let name = name.unwrap_or("UTC");
        let zone = jiff::tz::TimeZone::get(name)
            .map_err(|_| ApiError::field("timezone", "must be an IANA time zone such as America/New_York"))?;
        Ok(Self { zone })
    }

    /// The calendar day of an instant.
    fn day(&self, at: DateTime<Utc>) -> Result<NaiveDate, ApiError> {
        let at = jiff::Timestamp::from_second(at.timestamp()).map_err(|_| ApiError::Internal)?;
        let date = at.to_zoned(self.zone.clone()).date();
        NaiveDate::from_ymd_opt(
            i32::from(date.year()),
            date.month().unsigned_abs().into(),
            date.day().unsigned_abs().into(),
        )
        .ok_or(ApiError::Internal)
    }

    /// The first instant of a calendar day.
    fn begin(&self, day: NaiveDate) -> Result<DateTime<Utc>, ApiError> {
        let out_of_range = || ApiError::field("since", "is out of range");
        let year = i16::try_from(day.year()).map_err(|_| out_of_range())?;
        let part = |n: u32| i8::try_from(n).map_err(|_| out_of_range());
        let date = jiff::civil::Date::new(year, part(day.month())?, part(day.day())?).map_err(|_| out_of_range())?;
        let first = date.to_zoned(self.zone.clone()).map_err(|_| out_of_range())?.timestamp();
        DateTime::from_timestamp(first.as_second(), 0).ok_or_else(out_of_range)
    }

    /// The first instants of some calendar days.
    fn begins(&self, days: &[NaiveDate]) -> Result<Vec<DateTime<Utc>>, ApiError> {
        days.iter().map(|day| self.begin(*day)).collect()
    }

    /// A day that a request names, by date or by time.
    fn read(&self, field: &str, given: &str) -> Result<NaiveDate, ApiError> {
        match NaiveDate::parse_from_str(given, "%Y-%m-%d") {
            Ok(day) if (1970..=9998).contains(&day.year()) => Ok(day),
            _ => self.day(period::time(given).map_err(|message| ApiError::field(field, message))?),
        }
    }
}

/// A company's costs by day
///
/// Every calendar day of a time zone, both ends included, oldest first.
#[utoipa::path(get, path = "/companies/{company}/costs/daily", tag = "Costs",
    params(("company" = String, Path, description = "`co_…`"), DailyQuery),
    responses((status = 200, description = "The days.", body = All<Day>)))]
async fn daily(
    State(state): Shared,
    caller: Caller,
    Path(company): Path<String>,
    Query(query): Query<DailyQuery>,
) -> Result<Response, ApiError> {
    let mut tx = caller.read(&state).await?;
    let company = caller.company_id(&mut tx, &company).await?;
    let zone = Zone::named(query.timezone.as_deref())?;
    let last = match query.until.as_deref() {
        Some(until) => zone.read("until", until)?,
        None => zone.day(usage::now(&mut tx).await?)?,
    };
    let first = match query.since.as_deref() {
        Some(since) => zone.read("since", since)?,
        None => last.checked_sub_days(Days::new(DAYS)).unwrap_or(last),
    };
    if first > last {
        return Err(ApiError::field("until", "must not be before `since`"));
    }
    if (last - first).num_days() >= DAYS_MAX {
        return Err(ApiError::field("since", format!("and `until` must be less than {DAYS_MAX} days apart")));
    }
    let mut days: Vec<(NaiveDate, Sums)> =
        first.iter_days().take_while(|day| *day <= last).map(|day| (day, Sums::default())).collect();
    let begins = zone.begins(&days.iter().map(|(day, _)| *day).collect::<Vec<_>>())?;
    let end = zone.begin(last.succ_opt().unwrap_or(last))?;
    for one in usage::spent_daily(&mut tx, company, &begins, end).await? {
        if let Some((_, sums)) = days.get_mut(one.day) {
            sums.add(&one.category, one.nanos);
        }
    }
    let days = days.into_iter();
    caller.all(days.map(|(date, sums)| Day { date, total: sums.total().to_usd(), breakdown: sums.show() }).collect())
}

/// What a company will spend.
#[derive(Debug, Serialize, ToSchema)]
struct CompanyForecast {
    #[schema(value_type = String)]
    company_id: CompanyId,
    forecast: Estimates,
    /// `rising`, `falling` or `stable`.
    trend: &'static str,
    /// USD, as configured.
    #[schema(required)]
    budget_limit_daily: Option<f64>,
    /// The projected daily spend as a part of that.
    #[schema(required)]
    budget_utilization: Option<f64>,
    projection_window: Window,
    /// Forecasts are made anew each hour.
    computed_at: Time,
}

/// In USD.
#[derive(Debug, Serialize, ToSchema)]
struct Estimates {
    daily_avg: f64,
    weekly_estimate: f64,
    monthly_estimate: f64,
    /// From 0 to 1.
    confidence: f64,
    /// Where the month's spend lies with a probability of 80 %.
    monthly_interval: Interval,
}

/// From one amount to another, in USD.
#[derive(Debug, Serialize, ToSchema)]
struct Interval {
    low: f64,
    high: f64,
}

/// The days that a forecast is made from.
#[derive(Debug, Serialize, ToSchema)]
struct Window {
    based_on: Time,
    through: Time,
}

fn cents(usd: f64) -> f64 {
    (usd * 100.0).round() / 100.0
}

fn thousandths(part: f64) -> f64 {
    (part * 1e3).round() / 1e3
}

/// A company's cost forecast
///
/// From its last fourteen whole days.
#[utoipa::path(get, path = "/companies/{company}/costs/forecast", tag = "Costs",
    params(("company" = String, Path, description = "`co_…`")),
    responses((status = 200, description = "The forecast.", body = One<CompanyForecast>)))]
async fn forecasted(State(state): Shared, caller: Caller, Path(company): Path<String>) -> Result<Response, ApiError> {
    let mut tx = caller.read(&state).await?;
    let row = caller.company_row(&mut tx, &company).await?;
    let now = usage::now(&mut tx).await?;
    let zone = Zone::named(None)?;
    let today = now.date_naive();
    let first = today.checked_sub_days(Days::new(WINDOW_DAYS as u64)).unwrap_or(today);
    let (begin, end) = (zone.begin(first)?, zone.begin(today)?);
    // Days before the company's first say nothing.
    let born = row.created_at.date_naive();
    let window: Vec<NaiveDate> = first.iter_days().take_while(|day| *day < today).filter(|day| *day >= born).collect();
    let begins = zone.begins(&window)?;
    let mut days = vec![Nanos(0); window.len()];
    for one in usage::spent_daily(&mut tx, row.company, &begins, end).await? {
        if let Some(total) = days.get_mut(one.day) {
            total.0 = total.0.saturating_add(one.nanos.0);
        }
    }
    let f = forecast(&days);
    let limit = row.config.get("budget_limit_daily").and_then(serde_json::Value::as_f64);
    let hour = now.with_minute(0).and_then(|at| at.with_second(0)).unwrap_or(now);
    caller.figures(CompanyForecast {
        company_id: row.company,
        forecast: Estimates {
            daily_avg: cents(f.daily_avg),
            weekly_estimate: cents(f.weekly_estimate),
            monthly_estimate: cents(f.monthly_estimate),
            confidence: cents(f.confidence),
            monthly_interval: Interval { low: cents(f.monthly_low), high: cents(f.monthly_high) },
        },
        trend: f.trend,
        budget_limit_daily: limit,
        budget_utilization: limit.filter(|limit| *limit > 0.0).map(|limit| thousandths(f.daily_avg / limit)),
        projection_window: Window { based_on: Time(begin), through: Time(end) },
        computed_at: Time(hour),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_day_of_a_zone_begins_where_its_clocks_say() {
        let begin = |zone: &str, day: &str| {
            Zone::named(Some(zone)).expect("known").begin(day.parse().expect("a day")).expect("in range").to_rfc3339()
        };
        assert_eq!(begin("UTC", "2026-05-20"), "2026-05-20T00:00:00+00:00");
        assert_eq!(begin("America/New_York", "2026-05-20"), "2026-05-20T04:00:00+00:00");
        // Clocks go forward at midnight: the day begins at one.
        assert_eq!(begin("America/Havana", "2026-03-08"), "2026-03-08T05:00:00+00:00");
        assert_eq!(begin("Asia/Kathmandu", "2026-05-20"), "2026-05-19T18:15:00+00:00");
        assert!(Zone::named(Some("Mars/Olympus")).is_err());
    }
}
