//! An agent's work: turns of its model and the tools that it asks for, until it answers.
//! What comes next is decided by what the journal holds, so that a worker that takes over
//! goes on with the first call that has no result.

use std::sync::Arc;
use std::time::{Duration, Instant};

use capx_core::domain::agent::conversation::Called;
use capx_core::domain::agent::conversation::{Limits, Next, Turn, cut, messages, next, shown};
use capx_core::domain::agent::message::{Message, Reply, ToolResult};
use capx_core::domain::agent::price::Price;
use capx_core::domain::digest;
use capx_core::domain::money::Nanos;
use capx_core::domain::outcome::{ErrorClass, Failure, Outcome};
use capx_core::domain::plan::Gate;
use capx_core::engine::acting::{self, May};
use capx_core::engine::spending::{self, Asked, Came};
use capx_core::failpoint;
use capx_core::store::agents::AgentRow;
use capx_core::store::journal::Place;
use serde_json::{Map, Value, json};

use crate::adapters::{self, Answered, Ask, Offer, Payment, Task, Trouble};
use crate::egress;
use crate::handlers::{Hands, StepCall};
use crate::journal::{Journal, Journals};
use crate::mcp;
use crate::tools::registry::{self, OnUnknown, Tool};
use crate::tools::{self, ToolCall};

mod prompt;
mod ways;

use ways::{On, Way, spread, ways};

/// One attempt at a piece of work.
struct Attempt<'a> {
    hands: &'a Hands,
    call: &'a StepCall<'a>,
    agent: &'a AgentRow,
    /// The models that may be asked, the first one first.
    ways: Vec<Way>,
    journal: Journal<'a>,
    tools: Vec<Arc<Tool>>,
    system: String,
    task: Task<'a>,
    /// How long it may go on.
    limits: Limits,
    /// The number of the first turn that counts.
    base: u32,
    turns: Vec<Turn>,
    /// The model that has answered last in this very attempt.
    told: Option<String>,
}

/// Lets the agent of the step's role do it; what it costs is booked in a category.
pub async fn work(hands: &Hands, call: StepCall<'_>, journals: &Journals<'_>, category: &'static str) -> Outcome {
    let params = Value::Object(call.params.clone());
    match converse(hands, &call, &params, (journals, category)).await {
        Ok(output) => Outcome::Done { output, cost: journals.booked() },
        Err(Halt::Failed(failure)) => Outcome::Failed { failure, cost: journals.booked() },
        Err(Halt::Waits(delay)) => Outcome::Released { delay },
        Err(Halt::Asks(gate)) => Outcome::Asks(gate),
    }
}

/// Why an attempt goes no further.
enum Halt {
    /// It has failed.
    Failed(Failure),
    /// It is not its time: it is taken up again after a while, and no try is charged.
    Waits(Duration),
    /// A person is asked about a call.
    Asks(Box<Gate>),
}

impl From<Failure> for Halt {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

/// What has come of asking a model.
enum Answer {
    /// It has answered.
    Turn(Turn),
    /// It could not be asked, or has not answered; where there is no other, the attempt ends so.
    Not(On, Halt),
}

async fn converse(
    hands: &Hands,
    call: &StepCall<'_>,
    params: &Value,
    (journals, category): (&Journals<'_>, &'static str),
) -> Result<Value, Halt> {
    let role = call.step.role.as_deref().unwrap_or_default();
    let agent = call.agent.ok_or_else(|| {
        Failure::invalid(format!(
            "no agent of this company has the role `{role}`; add one, or correct the playbook's role"
        ))
    })?;
    if agent.status == "errored" {
        let why = agent.error.as_deref().unwrap_or("no reason is known");
        return Err(Failure::invalid(format!("the agent `{role}` is errored: {why}")).into());
    }
    let ways = ways(hands, call, agent)?;
    let journal = journals.of(&call.idempotency_key, agent.agent, category);
    if agent.status == "paused" {
        journal.hold().await?;
        return Err(Halt::Waits(Duration::ZERO));
    }
    let written = journal.read().await?;
    let memory = journal.remembered().await?;
    let names = agent.config.get("tools").and_then(Value::as_array);
    let mut tools = registry::offered(names, hands.sandbox.is_some());
    tools.extend(hands.mcp.offered(&hands.egress, call.company, names).await?);
    let mut attempt = Attempt {
        hands,
        call,
        agent,
        ways,
        journal,
        tools,
        system: prompt::system(agent, &memory),
        task: Task {
            company: call.company.to_string(),
            run: call.run.to_string(),
            playbook: &call.playbook.name,
            step: &call.step.id,
            action: &call.step.action,
            params,
            feedback: call.feedback,
            memory: &memory,
        },
        limits: Limits::of(&agent.config),
        base: written.base,
        turns: written.turns,
        told: None,
    };
    let over = matches!(next(&attempt.turns, attempt.limits), Next::Done(_) | Next::Stuck(_) | Next::Circles(_));
    if over && written.of_another {
        // The attempt that said this has failed with it: this one begins anew.
        attempt.base += u32::try_from(attempt.turns.len()).unwrap_or(u32::MAX);
        attempt.turns.clear();
    }
    attempt.run().await
}

impl Attempt<'_> {
    async fn run(mut self) -> Result<Value, Halt> {
        loop {
            match next(&self.turns, self.limits) {
                Next::Turn(turn) => {
                    let turn = self.turn(turn).await?;
                    self.turns.push(turn);
                }
                Next::Call { turn, call, id, name, input, unknown } => {
                    let called = self.tool(Place { turn: self.base + turn, call }, id, name, input, unknown).await?;
                    let place = usize::try_from(call - 1).unwrap_or(usize::MAX);
                    if let Some(turn) = self.turns.last_mut() {
                        turn.calls.truncate(place);
                        turn.calls.push(Some(called));
                    }
                }
                Next::Done(output) => return Ok(output),
                Next::Stuck(failure) => return Err(failure.into()),
                Next::Circles(failure) => {
                    self.journal.break_off(&failure.message).await?;
                    return Err(failure.into());
                }
            }
        }
    }

    fn left(&self) -> Duration {
        self.call.timeout.saturating_sub(self.call.began.elapsed())
    }

    /// The key of a call: that of the work itself for its first one.
    fn key(&self, place: Place) -> String {
        digest::call_key(&self.call.idempotency_key, place.turn, place.call)
    }

    /// Asks the model once more; another one, where that cannot be asked and the owner says so.
    async fn turn(&mut self, number: u32) -> Result<Turn, Halt> {
        let fresh = number == 0 && self.base > 0;
        let number = self.base + number;
        let mut last = None;
        for (at, way) in self.ways.iter().enumerate() {
            let others = self.ways.get(at + 1..).unwrap_or_default();
            match self.ask(way, number, fresh, others.iter().any(|other| other.on.contains(&On::Budget))).await? {
                Answer::Turn(turn) => {
                    self.told = Some(way.model.clone());
                    return Ok(turn);
                }
                Answer::Not(why, halt) => {
                    last = Some(halt);
                    if !others.iter().any(|other| other.on.contains(&why)) {
                        break;
                    }
                }
            }
        }
        Err(last.unwrap_or_else(|| Halt::Failed(Failure::invalid("no model may be asked"))))
    }

    /// Asks one model, in one way.
    async fn ask(&self, way: &Way, number: u32, fresh: bool, has_cheaper: bool) -> Result<Answer, Halt> {
        let place = Place { turn: number, call: 0 };
        let key = self.key(place);
        let messages = messages(prompt::task(&self.task), &self.turns);
        let timeout = adapters::turn_timeout(way.adapter.as_ref(), self.agent)?.min(self.left());
        let offers: Vec<Offer<'_>> = self.tools.iter().map(|tool| offer(tool)).collect();
        let ask = Ask {
            agent: self.agent,
            model: &way.model,
            system: &self.system,
            messages: &messages,
            tools: &offers,
            max_tokens: adapters::max_tokens(self.agent),
            key: &key,
            timeout,
            idle: self.call.idle,
            task: &self.task,
        };
        let (table, price) = self.price(way, &ask)?;
        let turn = spending::Turn {
            place,
            model: way.model.clone(),
            key: key.clone(),
            fresh,
            price,
            gate: way.adapter.gate().map(|account| format!("{account}/{}", way.model)),
            has_cheaper,
            payer: (way.adapter.payment() == Payment::Told).then(|| payer(self.agent, &way.model)),
            run_cap: self.call.playbook.budget,
            step_cap: self.call.step.budget,
            playbook_cap: self.call.playbook.execution.spend_cap,
        };
        match self.journal.turn_begins(&turn).await? {
            Asked::Go => {}
            Asked::Wait(delay) => return Err(Halt::Waits(delay)),
            Asked::Closed(delay) => return Ok(Answer::Not(On::Outage, Halt::Waits(spread(delay)))),
            Asked::TooDear => {
                let failure = Failure::invalid("there is no money for the model, and none for another");
                return Ok(Answer::Not(On::Budget, Halt::Failed(failure)));
            }
            Asked::Refused(failure) => return Err(failure.into()),
            Asked::Held | Asked::Lost => return Err(Halt::Waits(Duration::ZERO)),
        }
        failpoint::reach("agent.turn_begun").await;
        let began = Instant::now();
        let answered = way.adapter.turn(&self.hands.egress, &ask).await;
        failpoint::reach("agent.turn_answered").await;
        match answered {
            Ok(Answered { reply, cost, memory }) => {
                // Before the answer is stored, or nobody would know of it: once for each turn.
                // What it cannot be, the answer is paid for all the same.
                let remembered = self.journal.remember(&key, &memory, self.call.deeds).await;
                let cost = cost.unwrap_or_else(|| paid(table, price, &reply));
                self.journal.turn_ended(&turn, Came::Answer { response: json!(reply), cost }).await?;
                failpoint::reach("agent.turn_stored").await;
                remembered?;
                tracing::debug!(
                    run.id = %self.task.run, agent.id = %self.agent.agent, model = way.model, turn = number,
                    cost_nanos = cost.0, took_ms = began.elapsed().as_millis(), "a model has answered"
                );
                Ok(Answer::Turn(Turn { reply, calls: Vec::new() }))
            }
            Err(Trouble { failure, maybe_paid, closed_for, quota, fatal }) => {
                let came = Came::Trouble { failure: failure.clone(), maybe_paid, closed_for };
                self.journal.turn_ended(&turn, came).await?;
                if fatal && self.call.step.adapter.is_none() && self.call.step.model.is_none() {
                    // Its owner has to mend that; a step that names its own adapter fails alone.
                    self.journal.agent_fails(&failure.message).await?;
                }
                if maybe_paid && spending::waits_for_person(&self.agent.config, &turn) {
                    return Err(spending::left_to_person(&way.model).into());
                }
                let why = match quota {
                    true => On::Quota,
                    false if failure.class == ErrorClass::Invalid => return Err(failure.into()),
                    false => On::Outage,
                };
                // Everybody waits for the provider, and nobody's try is charged.
                let waits = closed_for.filter(|_| turn.gate.is_some());
                Ok(Answer::Not(why, waits.map_or(Halt::Failed(failure), |wait| Halt::Waits(spread(wait)))))
            }
        }
    }

    /// What the model's tokens cost, and what the turn may: a model without a price is not
    /// asked.
    fn price(&self, way: &Way, ask: &Ask<'_>) -> Result<(Option<&Price>, spending::Price), Failure> {
        let prices = &self.hands.providers.prices;
        // Prices change by days: which clock says so does not matter.
        let price = prices.of(&way.model, chrono::Utc::now().date_naive());
        match (way.adapter.payment(), price) {
            (Payment::Free, _) => Ok((None, spending::Price::AtMost(Nanos::ZERO))),
            (Payment::Told, price) => Ok((price, spending::Price::Afterwards)),
            (Payment::Priced, Some(price)) => {
                let worst = price.worst(self.read_at_most(ask), ask.max_tokens);
                let worst =
                    worst.ok_or_else(|| Failure::invalid("a turn of the model costs more than can be counted"))?;
                Ok((Some(price), spending::Price::AtMost(worst)))
            }
            (Payment::Priced, None) => Err(Failure::invalid(format!(
                "the model `{}` has no price, so nobody could say what it costs: name it in the file of CAPX_PRICES, or use one of {}",
                way.model,
                prices.models().join(", ")
            ))),
        }
    }

    /// What the provider can read at most, in tokens: none is shorter than a byte. Of what the same
    /// model has read before in this attempt it has told how much that was.
    fn read_at_most(&self, ask: &Ask<'_>) -> u64 {
        let mut known = 0;
        let mut said = ask.messages;
        let told = self.turns.last().filter(|_| self.told.as_deref() == Some(ask.model));
        if let Some(usage) = told.and_then(|turn| turn.reply.usage) {
            known = usage.read().saturating_add(usage.output);
            // Its own words are counted; what came after them is not.
            let last = ask.messages.iter().rposition(|message| matches!(message, Message::Assistant(_)));
            said = ask.messages.get(last.map_or(0, |at| at + 1)..).unwrap_or_default();
        }
        let bytes = |message: &Message| match message {
            Message::User(text) => text.len(),
            Message::Assistant(blocks) => serde_json::to_string(blocks).map_or(0, |text| text.len()),
            Message::Results(results) => results.iter().map(|result| result.content.len() + result.id.len()).sum(),
        };
        let mut bytes: usize = said.iter().map(bytes).sum();
        if known == 0 {
            bytes += ask.system.len();
            bytes += ask.tools.iter().map(|tool| tool.schema.to_string().len() + tool.description.len()).sum::<usize>();
        }
        u64::try_from(bytes).unwrap_or(u64::MAX).saturating_add(known).saturating_add(OVERHEAD_TOKENS)
    }

    /// Makes a call that the model has asked for; what is wrong with it is told to the model.
    async fn tool(&self, place: Place, id: String, name: String, input: Value, unknown: bool) -> Result<Called, Halt> {
        let told = |content: String, is_error: bool| ToolResult {
            id: id.clone(),
            name: name.clone(),
            content: cut(content),
            is_error,
        };
        let (tool, mut params) = match self.checked(&name, input) {
            Ok(checked) => checked,
            Err(problem) => return self.refuse(place, &name, told(problem, true)).await,
        };
        if unknown && tool.on_unknown == OnUnknown::Review {
            return Err(self.unheard(place, (id, &tool.name), "a worker died over it").await?);
        }
        let key = self.key(place);
        match self.journal.acts(&self.acting(place, &tool, &key, &params)).await? {
            May::Go { edited: None } => {}
            // A person wants it otherwise: their arguments are held to the same schema and rules.
            May::Go { edited: Some(edited) } => match self.checked(&name, edited) {
                Ok((_, edited)) => match self.journal.forbids(&self.acting(place, &tool, &key, &edited)).await? {
                    None => params = edited,
                    Some(why) => return self.refuse(place, &name, told(why, true)).await,
                },
                Err(problem) => return self.refuse(place, &name, told(problem, true)).await,
            },
            May::Ask(gate) => return Err(Halt::Asks(gate)),
            May::Refused(why) => return self.refuse(place, &name, told(why, true)).await,
            May::Wait(delay) => return Err(Halt::Waits(delay)),
            May::Held | May::Lost => return Err(Halt::Waits(Duration::ZERO)),
        }
        failpoint::reach("agent.call_begun").await;
        let sent = digest::hex(&digest::sha256(Value::Object(params.clone()).to_string()));
        let mut deeds = self.call.deeds.clone();
        deeds.doer.agent = Some(self.agent.agent);
        let call = ToolCall {
            company: self.call.company,
            run: self.call.run,
            params,
            secrets: None,
            artifacts: self.call.artifacts,
            deeds: &deeds,
            idempotency_key: key,
            timeout: self.left(),
            idle: self.call.idle,
        };
        let result = match tools::use_tool(self.hands, &tool.name, call).await {
            Ok(output) => told(shown(&output), false),
            // It was sent, and nobody has heard what came of it.
            Err(failure) if failure.class == ErrorClass::Timeout && tool.on_unknown == OnUnknown::Review => {
                return Err(self.unheard(place, (id, &tool.name), &failure.message).await?);
            }
            Err(failure) => told(failure.message, true),
        };
        failpoint::reach("agent.call_made").await;
        self.journal.call_ended((place, &tool.name, &self.key(place)), &result, Some(&sent)).await?;
        failpoint::reach("agent.call_stored").await;
        Ok(Called::Done { result, refused: false })
    }

    /// Nobody knows what came of a call that may not be made again: the work fails until a person has
    /// looked. The model learns of it when they let the run go on.
    async fn unheard(&self, place: Place, (id, name): (String, &str), why: &str) -> Result<Halt, Failure> {
        let content = format!(
            "nobody knows whether this call was made ({why}); a person has looked at it since and let the work go on: find out what it did before you make it again"
        );
        let result = ToolResult { id, name: name.to_owned(), content, is_error: true };
        self.journal.call_unheard(place, &result).await?;
        Ok(Halt::Failed(Failure::invalid(format!(
            "nobody knows whether a call of `{name}` was made ({why}); look at what it did, and retry the run"
        ))))
    }

    /// What is not called, and why the model is told so.
    async fn refuse(&self, place: Place, name: &str, result: ToolResult) -> Result<Called, Halt> {
        self.journal.call_begins(place, name, &self.key(place)).await?;
        self.journal.call_ended((place, name, &self.key(place)), &result, None).await?;
        Ok(Called::Done { result, refused: true })
    }

    /// A call as the company's policy, and a person, look at it.
    fn acting(&self, place: Place, tool: &Tool, key: &str, params: &Map<String, Value>) -> acting::Call {
        let url = params.get("url").and_then(Value::as_str);
        let hosts = self.agent.config.get("allowed_hosts").and_then(Value::as_array);
        let reasoning = self.turns.last().map(|turn| turn.reply.text()).unwrap_or_default();
        let reasoning: String = reasoning.chars().take(REASONING_CHARS_MAX).collect();
        acting::Call {
            place,
            tool: tool.name.to_string(),
            key: key.to_owned(),
            context: json!({
                "playbook": self.task.playbook, "step": self.task.step, "role": self.agent.role,
                "action": self.task.action, "tool": tool.name, "params": params, "reasoning": reasoning,
                "message": format!("the agent wants to use {}", tool.name),
            }),
            host: match tool.name.starts_with(mcp::PREFIX) {
                true => self.hands.mcp.host(&tool.name),
                false => url.map(|url| egress::host_of(url).unwrap_or_default()),
            },
            hosts: hosts.map(|hosts| hosts.iter().filter_map(|host| Some(host.as_str()?.to_owned())).collect()),
        }
    }

    /// The tool that a model means, and its arguments; or what is wrong with them.
    fn checked(&self, name: &str, input: Value) -> Result<(Arc<Tool>, serde_json::Map<String, Value>), String> {
        let Some(tool) = registry::find(&self.tools, name) else {
            let offered: Vec<String> = self.tools.iter().map(|tool| tool.wire_name()).collect();
            return Err(match offered.is_empty() {
                true => format!("there is no tool `{name}`: you have none"),
                false => format!("there is no tool `{name}`; you have {}", offered.join(", ")),
            });
        };
        match (tool.problem(&input), input) {
            (None, Value::Object(params)) => Ok((Arc::clone(tool), params)),
            (Some(problem), _) => Err(problem),
            (None, _) => Err(format!("the arguments of `{}` are no object", tool.name)),
        }
    }
}

/// Whom a turn of an agent's own endpoint pays.
fn payer(agent: &AgentRow, model: &str) -> String {
    let endpoint = agent.config.get("endpoint").and_then(Value::as_str).unwrap_or_default();
    format!("{} {model} {endpoint}", agent.adapter)
}

/// A tool as a model is told of it.
fn offer(tool: &Tool) -> Offer<'_> {
    Offer { name: tool.wire_name(), description: &tool.description, schema: &tool.schema }
}

/// What a turn has cost by what it has used; at its worst, where the provider does not say, or
/// says more than can be counted.
fn paid(table: Option<&Price>, price: spending::Price, reply: &Reply) -> Nanos {
    let counted = table.zip(reply.usage.as_ref()).and_then(|(table, usage)| table.cost(usage));
    match (counted, price) {
        (Some(cost), _) => cost,
        (None, spending::Price::AtMost(worst)) => worst,
        (None, spending::Price::Afterwards) => Nanos::ZERO,
    }
}

/// So much of what the model has said is shown to whoever decides about a call.
const REASONING_CHARS_MAX: usize = 4_000;
/// What providers add around it: the prompt that explains tools is some hundred tokens
/// (Anthropic's pricing page names up to 1,000), and a few for each message.
const OVERHEAD_TOKENS: u64 = 2_000;
