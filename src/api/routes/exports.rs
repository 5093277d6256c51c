//! All of a log at once, as a stream that is read a page at a time: whoever is slow to take it slows
//! the reading, and no more than two pages are held.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::header::{CONTENT_DISPOSITION, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use capx_core::domain::ids::{AgentId, CompanyId, RunId};
use capx_core::store::events::{self, FeedFilter, Place};
use capx_core::store::usage::{self, LedgerFilter, LedgerPlace, LedgerRow};
use chrono::{DateTime, SecondsFormat, Utc};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::time::Instant;
use utoipa::IntoParams;
use utoipa_axum::routes;

use super::Routes;
use super::activity::{Activity, shown};
use crate::api::auth::{Caller, Scope};
use crate::api::body::{Query, one_of};
use crate::api::{ApiError, ApiState, Shared, openapi, period};

const FORMATS: &[&str] = &["ndjson", "csv"];
/// Rows of one read.
const PAGE: i64 = 500;
/// How often an export looks whether its key is still good.
const KEY_CHECK: Duration = Duration::from_secs(2);

fn formats() -> utoipa::openapi::schema::Object {
    openapi::names(FORMATS)
}

pub(in crate::api) fn routes(routes: Routes) -> Routes {
    routes.with(Scope::ActivityRead, 5, routes!(activity)).with(Scope::ActivityRead, 5, routes!(ledger))
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct ExportQuery {
    /// `ndjson`, a JSON object a line, or `csv`.
    #[param(schema_with = formats, required = false)]
    format: Option<String>,
    /// `co_…`: of this company alone.
    company_id: Option<String>,
    /// What was at this time (ISO 8601) or later.
    since: Option<String>,
    /// What was up to this time (ISO 8601).
    until: Option<String>,
}

/// Which rows, and how they are written.
#[derive(Debug, Clone, Copy)]
struct Export {
    company: Option<CompanyId>,
    since: Option<DateTime<Utc>>,
    before: Option<DateTime<Utc>>,
    csv: bool,
}

async fn read(state: &ApiState, caller: &Caller, query: &ExportQuery) -> Result<Export, ApiError> {
    let csv = one_of("format", query.format.as_deref(), FORMATS)? == Some("csv");
    let (since, until) = period::range(query.since.as_deref(), query.until.as_deref())?;
    let company = match query.company_id.as_deref() {
        Some(id) => Some(caller.company_id(&mut *caller.read(state).await?, id).await?),
        None => caller.company,
    };
    Ok(Export { company, since, before: until.map(|until| until + chrono::Duration::seconds(1)), csv })
}

/// A cell that no spreadsheet takes for a formula.
fn harmless(cell: String) -> String {
    let is_number = cell.parse::<f64>().is_ok();
    if cell.starts_with(['=', '+', '-', '@', '\t', '\r']) && !is_number { format!("'{cell}") } else { cell }
}

fn answer(csv: bool, name: &str, pieces: mpsc::Receiver<Result<Bytes, ApiError>>) -> Response {
    let (kind, extension) = if csv { ("text/csv; charset=utf-8", "csv") } else { ("application/x-ndjson", "ndjson") };
    let pieces = futures_util::stream::unfold(pieces, |mut pieces| async move {
        let piece = pieces.recv().await?;
        // Broken off in the middle: whoever reads must not take it for all.
        Some((piece.map_err(|error| std::io::Error::other(format!("{error:?}"))), pieces))
    });
    let headers = [
        (CONTENT_TYPE, kind.to_owned()),
        (CONTENT_DISPOSITION, format!("attachment; filename=\"{name}.{extension}\"")),
    ];
    (headers, Body::from_stream(pieces)).into_response()
}

/// What is exported.
#[derive(Debug, Clone, Copy)]
enum Log {
    Activity,
    Ledger,
}

/// Where an export goes on.
#[derive(Debug, Clone, Copy)]
enum Next {
    Activity(Place),
    Ledger(LedgerPlace),
}

/// An export under way.
struct Exporter {
    state: Arc<ApiState>,
    caller: Caller,
    log: Log,
    export: Export,
    /// The names of columns are written.
    begun: bool,
    key_check: Instant,
}

/// Answers with a log: a task reads on as the answer is taken.
fn open(state: &Arc<ApiState>, caller: Caller, log: Log, export: Export) -> Response {
    let _ = caller.permit.charge(caller.credits);
    let (tell, told) = mpsc::channel(1);
    let key_check = Instant::now() + KEY_CHECK;
    let mut exporter = Exporter { state: Arc::clone(state), caller, log, export, begun: false, key_check };
    tokio::spawn(async move {
        let mut after = None;
        loop {
            let piece = exporter.piece(after).await;
            after = piece.as_ref().ok().and_then(|(_, next)| *next);
            if tell.send(piece.map(|(piece, _)| piece)).await.is_err() || after.is_none() {
                return;
            }
        }
    });
    let name = match log {
        Log::Activity => "activity",
        Log::Ledger => "ledger",
    };
    answer(export.csv, name, told)
}

impl Exporter {
    /// The next page as lines, and where the one after it begins.
    async fn piece(&mut self, after: Option<Next>) -> Result<(Bytes, Option<Next>), ApiError> {
        self.may_go_on().await?;
        let whole = |rows: usize| i64::try_from(rows).is_ok_and(|rows| rows == PAGE);
        let (account, Export { company, since, before, .. }) = (self.caller.account, self.export);
        let mut tx = self.caller.read(&self.state).await?;
        match self.log {
            Log::Activity => {
                let after = after.and_then(|next| if let Next::Activity(place) = next { Some(place) } else { None });
                let filter = FeedFilter { account, company, kinds: None, agent: None, since, before, after };
                let rows = events::feed(&mut tx, filter, false, PAGE).await?;
                let next = rows.last().filter(|_| whole(rows.len())).map(|row| Next::Activity(row.place));
                let rows = shown(&mut tx, rows).await?;
                Ok((self.lines(ACTIVITY, &rows, Activity::cells)?, next))
            }
            Log::Ledger => {
                let after = after.and_then(|next| if let Next::Ledger(place) = next { Some(place) } else { None });
                let filter = LedgerFilter { account, company, since, before, after };
                let (rows, next) = usage::ledger(&mut tx, filter, PAGE).await?;
                let next = next.map(Next::Ledger);
                let rows: Vec<Entry> = rows.into_iter().map(Entry::new).collect();
                Ok((self.lines(LEDGER, &rows, Entry::cells)?, next))
            }
        }
    }

    /// Its key is still good, and this process stays.
    async fn may_go_on(&mut self) -> Result<(), ApiError> {
        if self.state.stopping.is_cancelled() {
            return Err(ApiError::Internal);
        }
        if Instant::now() >= self.key_check {
            self.key_check = Instant::now() + KEY_CHECK;
            if !self.state.admission.is_good(&self.caller.permit).await {
                return Err(ApiError::Unauthorized("the key is good no more"));
            }
        }
        Ok(())
    }

    /// Rows in one piece; `named` is what stands above them in CSV.
    fn lines<T: Serialize>(
        &mut self,
        named: &[&str],
        rows: &[T],
        cells: impl Fn(&T) -> Vec<String>,
    ) -> Result<Bytes, ApiError> {
        fn broken(error: impl std::fmt::Display) -> ApiError {
            tracing::error!(%error, "an export cannot be written");
            ApiError::Internal
        }
        if !self.export.csv {
            let mut text = Vec::new();
            for row in rows {
                serde_json::to_writer(&mut text, row).map_err(broken)?;
                text.push(b'\n');
            }
            return Ok(text.into());
        }
        let mut writer = csv::WriterBuilder::new().terminator(csv::Terminator::CRLF).from_writer(Vec::new());
        if !std::mem::replace(&mut self.begun, true) {
            writer.write_record(named).map_err(broken)?;
        }
        for row in rows {
            writer.write_record(cells(row).into_iter().map(harmless)).map_err(broken)?;
        }
        writer.into_inner().map(Bytes::from).map_err(broken)
    }
}

const ACTIVITY: &[&str] = &[
    "id",
    "timestamp",
    "company_id",
    "type",
    "event",
    "actor_type",
    "actor_id",
    "actor_role",
    "resource_type",
    "resource_id",
    "summary",
    "data",
];

/// Export activity
///
/// All of it, oldest first, as a stream: what `GET /activity` shows, a line each.
#[utoipa::path(get, path = "/activity/export", tag = "Activity", params(ExportQuery),
    responses((status = 200, description = "The lines.", content((String = "application/x-ndjson"), (String = "text/csv")))))]
async fn activity(
    State(state): Shared,
    caller: Caller,
    Query(query): Query<ExportQuery>,
) -> Result<Response, ApiError> {
    let export = read(&state, &caller, &query).await?;
    Ok(open(&state, caller, Log::Activity, export))
}

/// An entry of the ledger.
#[derive(Debug, Serialize)]
struct Entry {
    id: String,
    timestamp: String,
    company_id: CompanyId,
    category: String,
    agent_id: Option<AgentId>,
    run_id: Option<RunId>,
    step_index: Option<i32>,
    model: Option<String>,
    /// USD, exact to the nano-dollar.
    cost: String,
    /// Nobody has heard what it cost: it is the most that it can have been.
    unheard: bool,
}

const LEDGER: &[&str] =
    &["id", "timestamp", "company_id", "category", "agent_id", "run_id", "step_index", "model", "cost", "unheard"];

impl Entry {
    fn new(row: LedgerRow) -> Self {
        let sign = if row.nanos < 0 { "-" } else { "" };
        let nanos = row.nanos.unsigned_abs();
        Self {
            id: row.id.to_string(),
            timestamp: row.at.to_rfc3339_opts(SecondsFormat::Micros, true),
            company_id: CompanyId(row.company_id),
            category: row.category,
            agent_id: row.agent_id.map(AgentId),
            run_id: row.run_id.map(RunId),
            step_index: row.step,
            model: row.model,
            cost: format!("{sign}{}.{:09}", nanos / 1_000_000_000, nanos % 1_000_000_000),
            unheard: row.unheard,
        }
    }

    fn cells(&self) -> Vec<String> {
        fn text(value: Option<impl ToString>) -> String {
            value.map(|value| value.to_string()).unwrap_or_default()
        }
        vec![
            self.id.clone(),
            self.timestamp.clone(),
            self.company_id.to_string(),
            self.category.clone(),
            text(self.agent_id),
            text(self.run_id),
            text(self.step_index),
            text(self.model.as_ref()),
            self.cost.clone(),
            self.unheard.to_string(),
        ]
    }
}

/// Export the ledger
///
/// Every entry, as a stream, oldest first in each company: what was spent, on what, in which
/// run. `cost` is text, in USD, exact to the nano-dollar; negative where what nobody had heard
/// of was taken back.
#[utoipa::path(get, path = "/costs/export", tag = "Costs", params(ExportQuery),
    responses((status = 200, description = "The lines.", content((String = "application/x-ndjson"), (String = "text/csv")))))]
async fn ledger(State(state): Shared, caller: Caller, Query(query): Query<ExportQuery>) -> Result<Response, ApiError> {
    let export = read(&state, &caller, &query).await?;
    Ok(open(&state, caller, Log::Ledger, export))
}
