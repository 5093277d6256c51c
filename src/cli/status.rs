//! `capx status`

use serde_json::{Value, json};

use super::client::{Client, list};
use super::exit::{AWAY, Exit};
use super::show;
use crate::out;

/// What there is, what is under way, and what stands still and why.
pub async fn run(client: &Client, as_json: bool) -> anyhow::Result<()> {
    let companies = client.get("/v1/companies?limit=100").await?["data"].take();
    let pending = seen(client.get("/v1/approvals?limit=100&status=pending").await)?;
    // Only operators see the fleet.
    let workers = seen(client.get("/v1/workers?limit=200").await)?;
    let queues = seen(client.get("/v1/queues").await)?;
    if as_json {
        show::json(&json!({"companies": companies, "approvals": pending, "workers": workers, "queues": queues}));
        return Ok(());
    }
    let rows = list(&companies).iter().map(|company| {
        [
            show::text(company, "id"),
            show::text(company, "name"),
            show::text(company, "status"),
            show::text(company, "agent_count"),
        ]
    });
    show::table(["COMPANY", "NAME", "STATUS", "AGENTS"], rows.collect(), "no companies yet");
    if queues.is_array() {
        out::line("");
        let rows = list(&queues).iter().map(|queue| {
            let age = queue["oldest_age"].as_f64().map_or("-".to_owned(), |age| format!("{age:.0} s"));
            let paused = if queue["paused"] == true { "paused" } else { "" };
            [
                show::text(queue, "name"),
                show::text(queue, "depth"),
                show::text(queue, "running"),
                age,
                paused.to_owned(),
            ]
        });
        show::table(["QUEUE", "READY", "RUNNING", "OLDEST", ""], rows.collect(), "nothing was ever queued");
    }
    out::line("");
    for word in standing(&companies, &pending, &workers, &queues) {
        out::line(format_args!("- {word}"));
    }
    Ok(())
}

/// What keeps work from being done, or that nothing does.
fn standing(companies: &Value, pending: &Value, workers: &Value, queues: &Value) -> Vec<String> {
    let mut told = Vec::new();
    let live = list(workers).iter().filter(|worker| worker["status"] == "active");
    match (workers.is_array(), live.count()) {
        (true, 0) => told.push("no worker runs, so nothing is done: start `capx worker`".to_owned()),
        (true, n) => told.push(format!("{n} worker{} at work", if n == 1 { "" } else { "s" })),
        (false, _) => {}
    }
    for company in list(companies).iter().filter(|company| company["status"] != "running") {
        told.push(format!("{} is {}", show::visible(&show::text(company, "name")), show::text(company, "status")));
    }
    for queue in list(queues).iter().filter(|queue| queue["paused"] == true) {
        told.push(format!("the queue `{}` is paused: {}", show::text(queue, "name"), show::text(queue, "reason")));
    }
    match list(pending).len() {
        0 => told.push("nothing waits for a person".to_owned()),
        1 => told.push("1 approval is pending: capx approval list".to_owned()),
        n => told.push(format!("{n} approvals are pending: capx approval list")),
    }
    told
}

/// A part of the answer; null where the key may not see it.
fn seen(answer: anyhow::Result<Value>) -> anyhow::Result<Value> {
    match answer {
        Ok(mut body) => Ok(body["data"].take()),
        Err(error) if error.downcast_ref::<Exit>().is_some_and(|exit| exit.code != AWAY) => Ok(Value::Null),
        Err(error) => Err(error),
    }
}
