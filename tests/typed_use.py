"""The public names as a user writes them. `pyright` (npm install pyright, or pip) checks this file: no attribute is unknown."""
import torch
import raptor

teacher = raptor.Backbone.create("vit_base_patch14_reg4_dinov2", pretrained=False, img_size=224)
teacher.embed, teacher.advance, teacher.states, teacher.trajectory
teacher.features, teacher.norm, teacher.cls, teacher.patches
teacher.depth, teacher.dim, teacher.num_heads, teacher.num_tokens, teacher.num_prefix, teacher.grid, teacher.fingerprint
teacher.freeze, teacher.unfreeze, teacher.save, teacher.mean, teacher.std, teacher.img_size, teacher.name
images = raptor.load_dataset("folder:images", "train", size=224)
source = raptor.LiveTrajectories(teacher, images)
source.batches, source.order, source.compute, source.fingerprint, source.depth, source.layers, source.num_images
cached = raptor.CachedTrajectories("folder")
cached.batches, cached.path, cached.fingerprint
distance = raptor.layer_distance(source, limit=1000, seed=0)
phases = raptor.max_cut(distance, k=3)
phases.ends, phases.counts, phases.spans, phases.k, phases.depth, phases.assignment
block = raptor.RecurrentBlock(64, 4)
block.step, block.advance, block.rollout, block.predict_next, block.transitions, block.config
model = raptor.Raptor.create(phases, 64, 4)
model.save_pretrained("folder")
model.push_to_hub("owner/name")
again = raptor.Raptor.from_pretrained("folder", revision="main")
again.blocks, again.phases, again.k, again.depth, again.step, again.states, again.rollout, again.flops, again.config
raptor.Raptor.from_blocks([])
student = raptor.RaptorBackbone(teacher, model)
student.forward_features(torch.zeros(1, 3, 8, 8)); student.forward_intermediates(torch.zeros(1, 3, 8, 8), indices=2)
student.num_features, student.embed_dim, student.depth, student.mean, student.name, student.fingerprint
small = raptor.RaptorBackbone.compact(teacher, model)
small.save_pretrained("folder"), small.push_to_hub("owner/name"), small.features(torch.zeros(1, 3, 8, 8)), small.config, small.k
raptor.RaptorBackbone.from_pretrained("folder", device="cpu", dtype=torch.bfloat16).forward_features(torch.zeros(1, 3, 8, 8))
raptor.export_model(student, "student.onnx", "onnx").name
config = raptor.TrainConfig(steps=5, lr=1e-3)
config.steps, config.loss, config.batch_size
history = raptor.train_span(source, block, (0, 3), config)
raptor.train_raptor(source, model, config)
study = raptor.Study.open("digits")
study.folder, study.name, study.home, study.preset, study.runs, study.controls, study.ends, study.known_ends
study.dataset("train"), study.teacher(), study.source("train"), study.model("k3-r0"), study.record(), study.load_tables("x")
fewer = raptor.Raptor.from_teacher(teacher, phases, stops=(2, 4), rank=4)
fewer.stops, fewer.num_steps, fewer.at((1, 2, 4)), fewer.path(0), raptor.RecurrentBlock.from_layers(teacher, (0, 4))
raptor.materialize(teacher, fewer, stops=None), raptor.early_exit(teacher, torch.zeros(1, 3, 8, 8), lambda before, after: after)
