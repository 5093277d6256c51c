//! Every request that the documentation of the API prints, sent as it is
//! printed, and every field of the printed answers, held against ours.
//!
//! An expectation is JSON: what stands there must come back, and may come back
//! with more beside it. A text that begins with `~` names a kind of value.

use serde_json::{Map, Value, json};

use crate::harness::{Db, SHORT_LEASE, eventually};

/// What is wrong with an answer, by its place.
fn faults(at: &str, wanted: &Value, given: &Value, found: &mut Vec<String>) {
    match (wanted, given) {
        (Value::String(kind), given) if kind.starts_with('~') => {
            let text = given.as_str();
            let fits = match kind.as_str() {
                "~string" => text.is_some(),
                "~time" => text.is_some_and(|t| t.len() == 20 && t.ends_with('Z') && t.as_bytes()[10] == b'T'),
                "~date" => text.is_some_and(|t| t.len() == 10 && t.as_bytes()[4] == b'-'),
                "~number" => given.is_number(),
                "~integer" => given.is_i64(),
                "~boolean" => given.is_boolean(),
                "~string or null" => given.is_null() || text.is_some(),
                "~time or null" => given.is_null() || text.is_some_and(|t| t.ends_with('Z')),
                "~number or null" => given.is_null() || given.is_number(),
                "~object" => given.is_object(),
                "~list" => given.is_array(),
                prefix => text.is_some_and(|t| t.starts_with(&prefix[1..]) && t.len() >= prefix.len()),
            };
            if !fits {
                found.push(format!("{at}: wanted {kind}, got {given}"));
            }
        }
        (Value::Object(wanted), Value::Object(given)) => {
            for (name, wanted) in wanted {
                match given.get(name) {
                    Some(given) => faults(&format!("{at}.{name}"), wanted, given, found),
                    None => found.push(format!("{at}.{name}: is missing")),
                }
            }
        }
        (Value::Array(wanted), Value::Array(given)) => {
            if given.len() < wanted.len() {
                found.push(format!("{at}: {} items instead of {}", given.len(), wanted.len()));
            }
            for (i, (wanted, given)) in wanted.iter().zip(given).enumerate() {
                faults(&format!("{at}.{i}"), wanted, given, found);
            }
        }
        (Value::Number(wanted), Value::Number(given)) if wanted.as_f64() == given.as_f64() => {}
        (wanted, given) if wanted == given => {}
        (wanted, given) => found.push(format!("{at}: wanted {wanted}, got {given}")),
    }
}

/// One printed exchange. `{name}` in a path is what an earlier answer gave.
struct Exchange {
    request: &'static str,
    body: Option<Value>,
    status: u16,
    credits: i64,
    data: Value,
    /// Whether the meta of a page is printed.
    page: bool,
    /// Names for values of the answer: (name, pointer into data).
    keep: &'static [(&'static str, &'static str)],
}

fn get(request: &'static str, data: Value) -> Exchange {
    Exchange { request, body: None, status: 200, credits: 1, data, page: false, keep: &[] }
}

fn page(request: &'static str, data: Value) -> Exchange {
    Exchange { page: true, ..get(request, data) }
}

fn action(request: &'static str, credits: i64, data: Value) -> Exchange {
    Exchange { credits, ..get(request, data) }
}

fn made(
    request: &'static str,
    credits: i64,
    body: Value,
    data: Value,
    keep: &'static [(&'static str, &'static str)],
) -> Exchange {
    Exchange { body: Some(body), status: 201, keep, ..action(request, credits, data) }
}

const RESEARCH: &str = "Autonomous research and report generation";

fn companies() -> Vec<Exchange> {
    let config = json!({"governance": "human_in_loop", "budget_limit_daily": 50.00, "timezone": "America/New_York"});
    let agent = json!({"role": "researcher", "adapter": "claude", "instructions": "Research topics and produce structured reports."});
    let shown = json!({
        "id": "~co_", "name": "Research Division", "description": RESEARCH, "config": config, "agent_count": 1,
        "created_at": "~time", "updated_at": "~time",
    });
    let with = |mut value: Value, more: Value| {
        value.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        value
    };
    vec![
        made(
            "POST /companies",
            5,
            json!({
                "name": "acme-marketing", "template": "saas-agency",
                "governance": {"spend_cap": 500, "approval_required": ["publish", "outbound-email"], "kill_switch": true},
                "agents": [{"role": "strategist", "adapter": "claude", "model": "claude-sonnet-4-6", "budget": 200}],
            }),
            json!({
                "id": "~co_", "name": "acme-marketing", "status": "provisioning",
                "agents": [{"role": "strategist", "status": "initializing", "adapter": "claude", "model": "claude-sonnet-4-6", "budget": 200, "used": 0}],
                "governance": {"spend_cap": 500, "approval_required": ["publish", "outbound-email"], "kill_switch": true},
                "created_at": "~time", "url": "acme-marketing.capx.ai",
            }),
            &[],
        ),
        made(
            "POST /companies",
            5,
            json!({"name": "Research Division", "description": RESEARCH, "config": config, "agents": [agent]}),
            with(shown.clone(), json!({"status": "provisioning"})),
            &[("company", "/id")],
        ),
        page(
            "GET /companies?status=running&limit=10",
            json!([{"id": "~co_", "name": "Research Division", "status": "running", "agent_count": 1, "created_at": "~time"}]),
        ),
        get("GET /companies/{company}", with(shown.clone(), json!({"status": "running", "total_cost": "~number"}))),
        Exchange {
            body: Some(
                json!({"name": "Research Division v2", "config": {"budget_limit_daily": 75.00, "governance": "autonomous"}}),
            ),
            ..action(
                "PATCH /companies/{company}",
                2,
                with(
                    shown,
                    json!({
                        "name": "Research Division v2", "status": "running",
                        "config": {"governance": "autonomous", "budget_limit_daily": 75.00, "timezone": "America/New_York"},
                    }),
                ),
            )
        },
    ]
}

fn agents() -> Vec<Exchange> {
    let config = json!({"heartbeat_interval": 300, "budget_limit_daily": 10.00, "tools": ["web_search", "file_read", "code_execute"]});
    let instructions = "Analyze incoming data and produce weekly summaries.";
    let daily = "Analyze incoming data. Produce daily summaries instead of weekly.";
    vec![
        made(
            "POST /companies/{company}/agents",
            3,
            json!({"role": "analyst", "adapter": "claude", "instructions": instructions, "config": config}),
            json!({
                "id": "~ag_", "company_id": "~co_", "role": "analyst", "adapter": "claude", "status": "initializing",
                "instructions": instructions, "config": config, "created_at": "~time",
            }),
            &[("agent", "/id")],
        ),
        page(
            "GET /companies/{company}/agents?status=active",
            json!([{"id": "~ag_", "role": "~string", "adapter": "claude", "status": "active", "last_heartbeat": "~time or null", "total_cost": "~number"}]),
        ),
        get(
            "GET /companies/{company}/agents/{agent}",
            json!({
                "id": "~ag_", "company_id": "~co_", "role": "analyst", "adapter": "claude", "status": "active",
                "instructions": instructions, "config": config, "last_heartbeat": "~time or null",
                "heartbeat_count": "~integer", "total_cost": "~number", "created_at": "~time", "updated_at": "~time",
            }),
        ),
        Exchange {
            body: Some(
                json!({"instructions": daily, "config": {"heartbeat_interval": 600, "budget_limit_daily": 15.00}}),
            ),
            ..action(
                "PATCH /companies/{company}/agents/{agent}",
                2,
                json!({
                    "id": "~ag_", "role": "analyst", "status": "active", "instructions": daily,
                    "config": {"heartbeat_interval": 600, "budget_limit_daily": 15.00, "tools": ["web_search", "file_read", "code_execute"]},
                    "updated_at": "~time",
                }),
            )
        },
        action(
            "POST /companies/{company}/agents/{agent}/wake",
            2,
            json!({"id": "~ag_", "status": "active", "wake_triggered": true, "heartbeat_started_at": "~time"}),
        ),
        action("POST /companies/{company}/agents/analyst/wake", 2, json!({"wake_triggered": true})),
        made(
            "POST /companies/{company}/tasks",
            2,
            json!({
                "title": "Draft the Q2 report", "description": "With a chapter on prices.", "agent_id": "{agent}", "priority": "high",
                "metadata": {"department": "research", "due_date": "2026-06-01"},
            }),
            json!({
                "id": "~tsk_", "company_id": "~co_", "agent_id": "~ag_", "title": "Draft the Q2 report",
                "description": "With a chapter on prices.", "status": "pending", "priority": "high",
                "metadata": {"department": "research", "due_date": "2026-06-01"}, "created_at": "~time",
            }),
            &[("task", "/id")],
        ),
        page(
            "GET /companies/{company}/tasks?status=pending",
            json!([{"id": "~tsk_", "status": "pending", "priority": "high"}]),
        ),
        page(
            "GET /companies/{company}/agents/{agent}/activity?type=task&limit=5",
            json!([{"type": "task", "task_id": "~tsk_", "action": "created", "summary": "~string", "timestamp": "~time"}]),
        ),
        get(
            "GET /companies/{company}/agents/{agent}/costs?since=2026-05-01",
            json!({
                "agent_id": "~ag_", "period": {"since": "2026-05-01T00:00:00Z", "until": "~time"},
                "breakdown": {"inference": "~number", "tools": "~number", "storage": "~number"},
                "total": "~number", "heartbeat_count": "~integer", "avg_cost_per_heartbeat": "~number or null",
            }),
        ),
    ]
}

fn activity_and_costs() -> Vec<Exchange> {
    let breakdown = json!({"inference": "~number", "tools": "~number", "storage": "~number"});
    let event = json!({
        "id": "~evt_", "type": "task", "action": "created", "actor": {"type": "agent", "id": "~ag_", "role": "analyst"},
        "summary": "Created task: Draft the Q2 report", "resource": {"type": "task", "id": "~tsk_"}, "timestamp": "~time",
    });
    vec![
        page("GET /companies/{company}/activity?type=task&since=2026-05-25T00:00:00Z&limit=10", json!([event])),
        page("GET /activity?type=task", json!([event])),
        get(
            "GET /companies/{company}/costs?since=2026-05-01&until=2026-05-25",
            json!({
                "company_id": "~co_", "period": {"since": "2026-05-01T00:00:00Z", "until": "2026-05-25T23:59:59Z"},
                "breakdown": breakdown, "by_agent": "~list", "total": "~number",
            }),
        ),
        get(
            "GET /companies/{company}/costs/daily?since=2026-05-20&until=2026-05-25&timezone=America/New_York",
            json!(
                (20..=25)
                    .map(|day| json!({"date": format!("2026-05-{day}"), "total": "~number", "breakdown": breakdown}))
                    .collect::<Vec<_>>()
            ),
        ),
        get(
            "GET /companies/{company}/costs/forecast",
            json!({
                "company_id": "~co_",
                "forecast": {"daily_avg": "~number", "weekly_estimate": "~number", "monthly_estimate": "~number", "confidence": "~number"},
                "trend": "stable", "budget_limit_daily": 75.00, "budget_utilization": "~number",
                "projection_window": {"based_on": "~time", "through": "~time"}, "computed_at": "~time",
            }),
        ),
        get(
            "GET /costs",
            json!({"period": {"since": "~time", "until": "~time"}, "by_agent": "~list", "total": "~number"}),
        ),
    ]
}

/// The definition in its printed form, which indents by single spaces.
const YAML: &str = "name: Weekly Market Report\ntrigger:\n schedule: '0 9 * * MON'\nsteps:\n - role: researcher\n   action: research\n   params:\n     topic: 'market trends'\n     depth: comprehensive\n - role: writer\n   action: compile_report\n   params:\n     format: pdf\n     sections: [summary, data, recommendations]\nrubric:\n min_sources: 5\n max_cost: 5.00";

fn playbooks() -> Vec<Exchange> {
    let description = "Research market trends and generate a structured PDF report every Monday.";
    let tags = json!(["research", "weekly", "automated"]);
    let trigger = json!({"type": "schedule", "schedule": "0 9 * * MON"});
    let params = json!({"topic": "AI infrastructure funding Q2 2026", "depth": "deep"});
    let step = |index: i64, role: &str, action: &str| {
        json!({
            "index": index, "role": role, "agent_id": "~ag_", "action": action, "status": "completed", "cost": "~number",
            "duration": "~number", "output": "~object",
        })
    };
    vec![
        made(
            "POST /companies/{company}/agents",
            3,
            json!({"role": "writer", "adapter": "claude", "instructions": "Write."}),
            json!({"id": "~ag_"}),
            &[],
        ),
        made(
            "POST /companies/{company}/playbooks",
            3,
            json!({"name": "Weekly Market Report", "description": description, "yaml": YAML, "tags": tags}),
            json!({
                "id": "~pb_", "company_id": "~co_", "name": "Weekly Market Report", "description": description,
                "status": "active", "step_count": 2, "tags": tags, "trigger": trigger, "created_at": "~time",
            }),
            &[("playbook", "/id")],
        ),
        page(
            "GET /companies/{company}/playbooks?status=active",
            json!([{
                "id": "~pb_", "name": "Weekly Market Report", "status": "active", "step_count": 2,
                "last_run_at": "~time or null", "run_count": 0, "tags": tags,
            }]),
        ),
        page("GET /companies/{company}/playbooks?tag=weekly&tag=research", json!([{"id": "~pb_"}])),
        page("GET /playbooks", json!([{"id": "~pb_", "name": "Weekly Market Report"}])),
        get(
            "GET /companies/{company}/playbooks/{playbook}",
            json!({
                "id": "~pb_", "company_id": "~co_", "name": "Weekly Market Report", "description": description,
                "status": "active", "yaml": YAML,
                "steps": [{"role": "researcher", "action": "research"}, {"role": "writer", "action": "compile_report"}],
                "trigger": trigger, "rubric": {"min_sources": 5, "max_cost": 5.00}, "run_count": 0,
                "avg_run_cost": "~number", "avg_run_duration": "~number", "created_at": "~time",
            }),
        ),
        made(
            "POST /companies/{company}/playbooks/{playbook}/run",
            2,
            json!({"params": params}),
            json!({"run_id": "~run_", "playbook_id": "~pb_", "status": "running", "params": params, "started_at": "~time"}),
            &[("run", "/run_id")],
        ),
        made(
            "POST /playbooks/run?wait=60",
            2,
            json!({"playbook_id": "{playbook}", "inputs": params}),
            json!({"run_id": "~run_", "status": "completed"}),
            &[],
        ),
        get(
            "GET /companies/{company}/playbooks/{playbook}/runs/{run}?wait=60",
            json!({
                "run_id": "~run_", "playbook_id": "~pb_", "status": "completed", "params": params,
                "steps": [step(0, "researcher", "research"), step(1, "writer", "compile_report")],
                "total_cost": "~number", "duration": "~number", "started_at": "~time", "completed_at": "~time",
            }),
        ),
        page(
            "GET /companies/{company}/playbooks/{playbook}/runs?status=completed&limit=5",
            json!([{
                "run_id": "~run_", "status": "completed", "cost": "~number", "duration": "~number", "started_at": "~time",
                "completed_at": "~time",
            }]),
        ),
        page("GET /playbooks/{playbook}/runs", json!([{"run_id": "~run_"}])),
    ]
}

fn ends() -> Vec<Exchange> {
    vec![
        action("POST /companies/{company}/agents/analyst/pause", 2, json!({"id": "~ag_", "status": "paused"})),
        action("DELETE /companies/{company}/agents/{agent}", 1, json!({"id": "~ag_", "deleted": true})),
        action("POST /companies/{company}/pause", 2, json!({"id": "~co_", "status": "paused", "paused_at": "~time"})),
        action(
            "POST /companies/{company}/resume",
            2,
            json!({"id": "~co_", "status": "running", "resumed_at": "~time"}),
        ),
        action("POST /companies/{company}/pause", 2, json!({"status": "paused"})),
        action("DELETE /companies/{company}", 1, json!({"id": "~co_", "deleted": true})),
    ]
}

fn fill(text: &str, names: &Map<String, Value>) -> String {
    names
        .iter()
        .fold(text.to_owned(), |text, (name, value)| text.replace(&format!("{{{name}}}"), value.as_str().unwrap()))
}

#[tokio::test(flavor = "multi_thread")]
async fn every_printed_exchange_works_as_it_is_printed() {
    let db = Db::new().await;
    let _worker = db.worker(SHORT_LEASE);
    let api = db.api().await;
    let mut names = Map::new();
    let mut exchanged = 0;
    let all = [companies(), agents(), activity_and_costs(), playbooks(), ends()];
    for exchange in all.into_iter().flatten() {
        let (method, path) = exchange.request.split_once(' ').unwrap();
        let path = format!("/v1{}", fill(path, &names));
        let body = exchange.body.map(|body| serde_json::from_str(&fill(&body.to_string(), &names)).unwrap());
        if method == "GET" || path.ends_with("/wake") || path.contains("/agents/") {
            // What was just made gets ready; the activity is told in order.
            eventually("the agents to be ready, and their beats to be told", || async {
                db.count("select count(*) from agents where status = 'initializing'").await
                    + db.count("select count(*) from companies where status = 'provisioning'").await
                    == 0
            })
            .await;
        }
        if method == "POST" && path.ends_with("/tasks") {
            // An agent that was woken would take the task before it is looked at.
            eventually("the beats that were asked for to be over", || async {
                db.count("select count(*) from jobs where kind = 'heartbeat' and due_at <= now()").await == 0
            })
            .await;
        }
        if path.contains("/activity") {
            // What an open transaction of anybody on the server may still come before is shown later.
            eventually("what has happened to be shown", || async {
                db.count("select count(*) from events where xid >= pg_snapshot_xmin(pg_current_snapshot())").await == 0
            })
            .await;
        }
        let mut found = Vec::new();
        let (status, answer) = api.send(method, &path, body).await;
        if status != exchange.status {
            found.push(format!("status {status} instead of {}", exchange.status));
        }
        let mut wanted = json!({
            "success": true, "data": exchange.data,
            "meta": {"credits_used": exchange.credits, "credits_remaining": "~integer", "request_id": "~string"},
        });
        if exchange.page {
            wanted["meta"]["cursor"] = "~string or null".into();
            wanted["meta"]["has_more"] = "~boolean".into();
        }
        faults("", &wanted, &answer, &mut found);
        assert!(found.is_empty(), "{}: {found:#?}\n{answer}", exchange.request);
        for (name, pointer) in exchange.keep {
            names.insert((*name).to_owned(), answer["data"].pointer(pointer).unwrap().clone());
        }
        exchanged += 1;
    }
    assert!(exchanged >= 38, "{exchanged}");
}

#[test]
fn the_matcher_finds_what_is_wrong() {
    let wrong = |wanted: Value, given: Value| {
        let mut found = Vec::new();
        faults("", &wanted, &given, &mut found);
        found.len()
    };
    assert_eq!(wrong(json!({"a": 1.50, "b": ["~co_"]}), json!({"a": 1.5, "b": ["co_1"], "c": 1})), 0);
    for (wanted, given) in [
        (json!({"a": 1}), json!({})),
        (json!({"a": 1}), json!({"a": "1"})),
        (json!("~time"), json!("2026-05-25")),
        (json!("~co_"), json!("co_")),
        (json!([1, 2]), json!([1])),
        (json!("~integer"), json!(1.5)),
        (json!("~number"), json!(null)),
    ] {
        assert_eq!(wrong(wanted.clone(), given.clone()), 1, "{wanted} {given}");
    }
}
