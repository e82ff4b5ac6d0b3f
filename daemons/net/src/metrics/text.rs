//! The numbers as OpenMetrics text.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use crate::control::PortNumbers;
use crate::counters::Counted;
use crate::link::DropReason;

/// The text of an answer.
pub fn encode(ports: Vec<PortNumbers>) -> String {
    let mut registry = Registry::default();
    let version = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
    registry.register("outboard_build", "The daemon's version", version);
    registry.register_collector(Box::new(Ports(ports)));
    let mut text = String::new();
    // A string takes everything, so nothing but the encoder's own rules can fail here, and those do not.
    if prometheus_client::encoding::text::encode(&mut text, &registry).is_err() {
        tracing::error!("metrics cannot be encoded");
        text.clear();
    }
    text
}

/// The ports at one moment.
#[derive(Debug)]
struct Ports(Vec<PortNumbers>);

/// One direction of one pair.
struct Direction<'a> {
    port: &'a str,
    pair: String,
    direction: &'static str,
    counted: Counted,
}

impl Direction<'_> {
    fn labels(&self) -> [(&'static str, &str); 3] {
        [
            ("port", self.port),
            ("pair", &self.pair),
            ("direction", self.direction),
        ]
    }
}

impl Ports {
    fn directions(&self) -> impl Iterator<Item = Direction<'_>> {
        self.0.iter().flat_map(|port| {
            let pairs = port.pairs.iter().enumerate();
            pairs.flat_map(move |(index, (rx, tx))| {
                [("rx", *rx), ("tx", *tx)].map(|(direction, counted)| Direction {
                    port: &port.id,
                    pair: index.to_string(),
                    direction,
                    counted,
                })
            })
        })
    }

    fn carried(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let counter = ConstCounter::new(0u64).metric_type();
        let what = "Frames that went through, to the guest (rx) or from it (tx)";
        let mut family = encoder.encode_descriptor("outboard_port_frames", what, None, counter)?;
        for direction in self.directions() {
            let value = ConstCounter::new(direction.counted.frames);
            value.encode(family.encode_family(&direction.labels())?)?;
        }
        let what = "Bytes of these frames, virtio-net headers not included";
        let unit = Some(&Unit::Bytes);
        let counter = ConstCounter::new(0u64).metric_type();
        let mut family = encoder.encode_descriptor("outboard_port", what, unit, counter)?;
        for direction in self.directions() {
            let value = ConstCounter::new(direction.counted.bytes);
            value.encode(family.encode_family(&direction.labels())?)?;
        }
        let what = "Frames that went nowhere";
        let counter = ConstCounter::new(0u64).metric_type();
        let mut family = encoder.encode_descriptor("outboard_port_dropped", what, None, counter)?;
        for direction in self.directions() {
            for reason in DropReason::ALL {
                let [port, pair, way] = direction.labels();
                let labels = [port, pair, way, ("reason", reason.name())];
                let value = ConstCounter::new(direction.counted.dropped(reason));
                value.encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }

    fn states(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        type Number = fn(&PortNumbers) -> i64;
        let gauges: [(&str, &str, Number); 3] = [
            ("outboard_port_link_up", "Whether the link is up", |port| {
                i64::from(port.link)
            }),
            (
                "outboard_port_connected",
                "Whether a front-end is there",
                |port| i64::from(port.connected),
            ),
            (
                "outboard_port_queue_pairs",
                "Queue pairs that the guest uses",
                |port| i64::from(port.pairs_in_use),
            ),
        ];
        for (name, what, number) in gauges {
            let gauge = ConstGauge::new(0i64).metric_type();
            let mut family = encoder.encode_descriptor(name, what, None, gauge)?;
            for port in &self.0 {
                let labels = [("port", port.id.as_str()), ("netdev", port.netdev.as_str())];
                ConstGauge::new(number(port)).encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }

    /// Gauges, because each capture begins at zero.
    fn captures(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        type Number = fn((u64, u64)) -> u64;
        let gauges: [(&str, &str, Number); 2] = [
            (
                "outboard_port_capture_frames",
                "Frames that the running capture has written",
                |(written, _)| written,
            ),
            (
                "outboard_port_capture_lost_frames",
                "Frames that the running capture has lost",
                |(_, lost)| lost,
            ),
        ];
        for (name, what, number) in gauges {
            let gauge = ConstGauge::new(0i64).metric_type();
            let mut family = encoder.encode_descriptor(name, what, None, gauge)?;
            for port in &self.0 {
                if let Some(capture) = port.capture {
                    let value = ConstGauge::new(number(capture) as i64);
                    value.encode(family.encode_family(&[("port", port.id.as_str())])?)?;
                }
            }
        }
        Ok(())
    }

    fn rings(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let rings = || {
            let ports = self.0.iter();
            ports.flat_map(|port| port.rings.iter().map(move |ring| (port.id.as_str(), ring)))
        };
        let gauge = || ConstGauge::new(0i64).metric_type();
        let what = "Descriptors of a ring that runs: 2i receives for pair i, 2i+1 sends";
        let name = "outboard_port_ring_descriptors";
        let mut family = encoder.encode_descriptor(name, what, None, gauge())?;
        for (port, ring) in rings() {
            let index = ring.index.to_string();
            let labels = [("port", port), ("ring", index.as_str())];
            let size = ConstGauge::new(i64::from(ring.size));
            size.encode(family.encode_family(&labels)?)?;
        }
        let what = "Whether the guest broke a ring that ran";
        let name = "outboard_port_ring_broken";
        let mut family = encoder.encode_descriptor(name, what, None, gauge())?;
        for (port, ring) in rings() {
            let index = ring.index.to_string();
            let labels = [("port", port), ("ring", index.as_str())];
            let broken = ConstGauge::new(i64::from(ring.broken));
            broken.encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

impl Collector for Ports {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.carried(&mut encoder)?;
        self.states(&mut encoder)?;
        self.captures(&mut encoder)?;
        self.rings(&mut encoder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::counters::PortCounters;
    use crate::port::RingReport;

    #[test]
    fn every_number_has_its_name_unit_and_labels() {
        let counters = PortCounters::new(1);
        counters.pairs[0].tx.count(3, 180);
        counters.pairs[0].rx.count_drop(DropReason::NoBuffers);
        let text = encode(vec![PortNumbers {
            id: "p0".into(),
            netdev: "n0".into(),
            connected: true,
            link: false,
            pairs_in_use: 1,
            capture: Some((5, 2)),
            rings: vec![RingReport {
                enabled: true,
                index: 1,
                size: 256,
                broken: true,
            }],
            pairs: vec![(counters.pairs[0].rx.read(), counters.pairs[0].tx.read())],
        }]);
        let pair = r#"port="p0",pair="0""#;
        for line in [
            format!(r#"outboard_port_frames_total{{{pair},direction="tx"}} 3"#),
            format!(r#"outboard_port_bytes_total{{{pair},direction="tx"}} 180"#),
            format!(r#"outboard_port_bytes_total{{{pair},direction="rx"}} 0"#),
            format!(
                r#"outboard_port_dropped_total{{{pair},direction="rx",reason="no-buffers"}} 1"#
            ),
            r#"outboard_port_link_up{port="p0",netdev="n0"} 0"#.into(),
            r#"outboard_port_connected{port="p0",netdev="n0"} 1"#.into(),
            r#"outboard_port_queue_pairs{port="p0",netdev="n0"} 1"#.into(),
            r#"outboard_port_ring_descriptors{port="p0",ring="1"} 256"#.into(),
            r#"outboard_port_ring_broken{port="p0",ring="1"} 1"#.into(),
            r#"outboard_port_capture_frames{port="p0"} 5"#.into(),
            r#"outboard_port_capture_lost_frames{port="p0"} 2"#.into(),
            format!(
                r#"outboard_build_info{{version="{}"}} 1"#,
                env!("CARGO_PKG_VERSION")
            ),
        ] {
            assert!(text.lines().any(|known| known == line), "{line}\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn no_port_is_no_error() {
        assert!(encode(Vec::new()).ends_with("# EOF\n"));
    }
}
